"""Floor 5: likelihood bounds, generation scored by metrics, and speed; every number carries its conditions."""
