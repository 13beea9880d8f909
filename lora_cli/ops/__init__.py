"""The arithmetic of a training step, free of models and recipes."""
