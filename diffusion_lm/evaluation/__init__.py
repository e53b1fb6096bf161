"""Layer 5: likelihood bounds and scoring, generation scored by metrics, and decoding speed."""
