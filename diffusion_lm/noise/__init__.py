"""Floor 1: what noise is added, how much, when, and how the loss at each level is weighed."""
