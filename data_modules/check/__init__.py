"""``data check``: problems in a config's data, found before a run."""
