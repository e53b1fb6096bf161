"""The command line (the top layer), one file per verb. Building the parser imports neither JAX nor TensorFlow."""
