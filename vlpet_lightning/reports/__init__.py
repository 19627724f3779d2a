"""Reports of finished runs: comparison of methods over seeds, published rows, bootstrap intervals, figures."""
