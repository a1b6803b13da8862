"""Training: the base checkpoints from nothing, and their fine-tuning with each loss."""
