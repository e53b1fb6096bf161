"""Implements `diffusion-lm bench`: training, decoding, input pipeline and startup, alone or against PyTorch."""
