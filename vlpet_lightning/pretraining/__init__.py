"""Text-only training of a small language model, so that small experiments have a backbone to freeze."""
