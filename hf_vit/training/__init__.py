"""Training: recipe, loop, checkpoints, report."""
