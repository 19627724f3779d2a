"""From samples to batches: sampling, prompts, tokenisation and answer drawing."""
