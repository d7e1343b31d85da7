"""The loop around the algorithms: steps, evaluation, optimizer, checkpoints, the probe."""
