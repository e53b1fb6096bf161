"""Launchers that start `diffusion-lm` on Cloud TPUs, GKE, Slurm clusters, or as several processes on this machine."""
