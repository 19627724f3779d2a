"""The contract of every PET method that acts inside a layer: ``unit(x, h) -> h``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

INIT_STD = 0.02  # BART's init_std: its _init_weights also initialises the modules that the original adds to it


@dataclass(frozen=True)
class Context:
    """What a few units need to know about the batch beside their input.

    Args:
        task: Name of the batch's task.
        mask: ``(B, S)`` bool, true on real encoder positions, or None where padding counts like any other position.
    """

    task: str
    mask: Tensor | None = None


class Unit(nn.Module):
    """A PET module at one site of one layer.

    ``x`` ``(B, S, d)`` is what enters the sublayer, ``h`` ``(B, S, d)`` what leaves it after its last projection,
    before dropout, residual and norm. ``forward(x, h)`` returns the new ``h``.

    Attributes:
        needs_context: Set on the class of a unit, or of a part of one, that reads ``context``.
        context: The current batch's :class:`Context`; the model fills it before each forward where it is asked for.
    """

    needs_context = False
    context: Context | None = None

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, h)")

    def start_as_identity(self) -> None:
        """Re-initialise so that the first forward returns ``h`` exactly (the corrected protocol's start)."""
        raise ValueError(f"{type(self).__name__} has no identity start: use `start: original`")

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that belong to a gate: reported, and excluded from weight decay, on their own."""
        return []


UnitFactory = Callable[[int], Unit]  # called once a layer with the width of the place it is put at


def linear(inputs: int, outputs: int, std: float = INIT_STD) -> nn.Linear:
    """A linear layer that starts as BART's do: weight N(0, std), bias 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def zero(*layers: nn.Linear) -> None:
    """Set weights and biases to zero, in place."""
    with torch.no_grad():
        for layer in layers:
            layer.weight.zero_()
            layer.bias.zero_()


def positive(name: str, value: int) -> int:
    """Return ``value``.

    Raises:
        ValueError: If it is below 1.
    """
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
