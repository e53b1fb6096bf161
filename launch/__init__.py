"""Starts `diffusion-lm` on machines: `python -m launch.tpu_vm`, `launch.gke`, `launch.slurm`, and on this one."""
