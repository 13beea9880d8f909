"""The run: steps, evaluations, checkpoints, metrics."""
