"""Trained parameters as files of their own: saving, loading, merging, the model card."""
