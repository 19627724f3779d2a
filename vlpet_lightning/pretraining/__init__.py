"""Text-only pretraining of a small language model, used as the frozen backbone of small experiments."""
