"""Frozen image encoders, and how image files become their pixels."""
