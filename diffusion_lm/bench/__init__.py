"""What `diffusion-lm bench` measures: training, decoding, the input pipeline, starting up, and PyTorch beside them."""
