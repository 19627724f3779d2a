"""Weights & Biases sweep files run without its server: points, sweep folders, and launchers."""
