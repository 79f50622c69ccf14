"""Training: the initial checkpoint, and the steps from one checkpoint to the next."""
