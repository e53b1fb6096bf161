"""Floor 6: the command line, one file per verb. Building the parser imports neither JAX nor TensorFlow."""
