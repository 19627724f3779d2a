"""Command lines and checkpoints of the original implementations."""
