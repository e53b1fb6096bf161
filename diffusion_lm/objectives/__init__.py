"""Floor 3: what is minimised. An objective returns sums and weights; only the training step divides, once, globally."""
