"""Benchmarks, which print tables."""

import vlpet_lightning  # noqa: F401  # its torchvision cure must run before lightning is imported
