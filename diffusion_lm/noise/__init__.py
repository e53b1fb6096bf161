"""Layer 1: noise processes, schedules, time sampling and loss weights."""
