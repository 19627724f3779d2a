"""Sweeps in Weights & Biases' own YAML, run without its server: points, their folders, and who runs them."""
