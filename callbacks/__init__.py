"""Lightning callbacks: figures, checks, metrics and predictions around a run."""

import vlpet_lightning  # noqa: F401  # first: its cure must run before anything imports torchvision
from callbacks.distributed import Distributed
from callbacks.parameter_count import ParameterCount

__all__ = ["Distributed", "ParameterCount"]
