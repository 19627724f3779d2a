"""A self-contained page of a run's predictions, for a browser."""
