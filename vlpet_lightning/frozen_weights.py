"""Storage of frozen weights in a smaller type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlpet_lightning.pet import Unit, UnitLinear
from vlpet_lightning.trainable import Tunable


def cast_frozen(model: Tunable, dtype: torch.dtype) -> int:
    """Store the frozen weights of the language model's linear layers in another type, for use under autocast.

    Autocast converts float32 weights in every forward pass, because it caches conversions of trained weights only.
    Norms, biases and embeddings (and with them the tied vocabulary projection) keep their type, so that the residual
    stream does not change. So do layers whose unit computes with their weight (DoRA), and those that an extension such
    as peft has wrapped.

    Args:
        model: The model; its units are not converted.
        dtype: E.g. ``torch.bfloat16``.

    Returns:
        Number of converted weights.
    """
    embedding = model.backbone.token_embedding(model.lm)
    units = {id(parameter) for parameter in model.unit_parameters().values()}
    converted = 0
    for name, layer in model.lm.named_modules():
        if type(layer) not in (nn.Linear, UnitLinear) or name.endswith(".base_layer") or _is_read(layer):
            continue
        weight: Any = layer.weight
        if not (weight.requires_grad or weight is embedding or id(weight) in units):
            weight.data = weight.data.to(dtype)
            converted += weight.numel()
    return converted


def _is_read(layer: nn.Module) -> bool:
    """Return whether a unit at the layer computes with the layer's weight."""
    return any(isinstance(part, Unit) and part.needs_linear for part in layer.modules())
