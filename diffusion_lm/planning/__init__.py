"""What a run will need and cost on accelerators that are not here: compiled ahead of time, read, and priced."""
