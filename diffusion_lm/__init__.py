"""One recipe, matched arms: autoregressive and diffusion language models in JAX.

Importing this package loads neither TensorFlow, SeqIO nor gin; its packages are imported one by one
(`docs/architecture.md`).
"""

__version__ = "0.2.0"
