"""``data check``: checks of a config's data before a run."""
