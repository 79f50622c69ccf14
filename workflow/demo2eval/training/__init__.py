"""Training: reading batches, the optimizer, and the state that is carried from segment to segment."""
