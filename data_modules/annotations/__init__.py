"""Readers of the benchmark's annotation files, and checks across splits."""
