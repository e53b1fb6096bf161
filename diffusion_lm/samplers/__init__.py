"""Floor 3: how text is generated. A sampler is one compiled program; nothing returns to the host between steps."""
