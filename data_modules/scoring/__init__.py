"""Scores of prediction files against annotation files, without a model."""
