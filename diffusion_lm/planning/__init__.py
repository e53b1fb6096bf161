"""Plans a run for TPUs or GPUs without access to them: compiles ahead of time and estimates memory and speed."""
