"""Floor 5: one training run: state, step, loop, optimizers, checkpoints, logs; `TrainRun` is its manual."""
