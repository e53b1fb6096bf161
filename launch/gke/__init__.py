"""Runs jobs on TPU node pools of Google Kubernetes Engine: `python -m launch.gke`."""
