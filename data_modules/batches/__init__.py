"""From samples to batches: sampling, prompts, tokens and drawn answers."""
