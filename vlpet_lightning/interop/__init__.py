"""Models and checkpoints of other code, in and out."""

from vlpet_lightning.interop.original.checkpoint import model_from_original, original_tensors

__all__ = ["model_from_original", "original_tensors"]
