"""The contract of every PET method that acts inside a layer: ``unit(x, h) -> h``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

INIT_STD = 0.02  # BART's init_std: its _init_weights also initialises the modules that the original adds to it

# How fresh weights are drawn: `normal` is N(0, 0.02) with biases 0, what the original's modules get inside BART;
# `uniform` is torch's own U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, what they keep inside T5.
# `+zero` sets the last layer to zero, weights and biases (src/trainer_base.py: weight_initialization).
Init = Literal["normal", "uniform", "normal+zero", "uniform+zero"]


@dataclass(frozen=True)
class Context:
    """What a few units need to know about the batch beside their input.

    Args:
        task: Name of the batch's task.
        mask: ``(B, S)`` bool, true on real encoder positions, or None where padding counts like any other position.
    """

    task: str
    mask: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where one unit is.

    Args:
        site: Name in the backbone's table of sites.
        stack: ``encoder`` or ``decoder``.
        layer: Index of the layer in its stack.
        layers: Layers of the stack.
    """

    site: str
    stack: str
    layer: int
    layers: int


class Unit(nn.Module):
    """A PET module at one site of one layer.

    ``x`` ``(B, S, d)`` is what enters the sublayer, ``h`` ``(B, S, d)`` what leaves it after its last projection,
    before dropout, residual and norm. ``forward(x, h)`` returns the new ``h``.

    Attributes:
        needs_context: Set on the class of a unit, or of a part of one, that reads ``context``.
        context: The current batch's :class:`Context`; the model fills it before each forward where it is asked for.
        may_skip_parameters: A step may leave some of its parameters without a gradient (modules of other tasks),
            so that DistributedDataParallel has to search for them.
        needs_linear: The unit computes with the weight of the linear layer at its site, which :meth:`bind` hands over.
        adds_tokens: It puts tokens in front of a stack's input, and is placed at a prompt's site.
        tasks: Names of the tasks that the unit has parts for; empty where it serves any.
        unmergeable: Why the unit cannot be folded into the linear layer that it stands behind.
    """

    needs_context = False
    context: Context | None = None
    may_skip_parameters = False
    needs_linear = False
    adds_tokens = False
    tasks: tuple[str, ...] = ()
    unmergeable = "it is not a linear map of the sublayer's input"

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, h)")

    def join(self, place: Place, shared: nn.ModuleDict) -> None:
        """Called once, when the unit is in its place.

        Args:
            place: Site and layer.
            shared: Modules of the whole model by name, for units that share some: take what is there, or add it.
        """

    def bind(self, linear: nn.Linear) -> None:
        """Called once, after injection, on a unit with ``needs_linear``.

        Args:
            linear: The layer whose input and output the unit's ``x`` and ``h`` are.
        """

    @property
    def is_identity(self) -> bool:
        """Whether a fresh unit with these settings returns ``h`` exactly."""
        return False

    def start_as_identity(self) -> None:
        """Re-initialise so that the first forward returns ``h`` exactly (the corrected protocol's start)."""
        raise ValueError(f"{type(self).__name__} has no identity start: use `start: original`")

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that belong to a gate: reported, and excluded from weight decay, on their own."""
        return []

    def merge(self, linear: nn.Linear, *, side: Literal["input", "output"] = "output") -> None:
        """Fold the unit into the linear layer it belongs to, in place, where that is exact.

        Args:
            linear: The layer whose input (``side="input"``) or output the unit works on.
            side: Of the layer, where the unit stands.

        Raises:
            ValueError: If it cannot be done; says why.
        """
        raise ValueError(f"{type(self).__name__} cannot be merged: {self.unmergeable}")


UnitFactory = Callable[[int], Unit]  # called once a layer with the width of the place it is put at


def linear(inputs: int, outputs: int, init: Init = "normal") -> nn.Linear:
    """A fresh linear layer with a bias."""
    check_init(init)
    layer = nn.Linear(inputs, outputs)
    if init.startswith("normal"):
        nn.init.normal_(layer.weight, std=INIT_STD)
        nn.init.zeros_(layer.bias)
    return layer


def last_linear(inputs: int, outputs: int, init: Init = "normal") -> nn.Linear:
    """A fresh linear layer at the end of a unit: zero where ``init`` says so."""
    layer = linear(inputs, outputs, init)
    if starts_at_zero(init):
        zero(layer)
    return layer


def starts_at_zero(init: Init) -> bool:
    """Whether the last layer starts as zero."""
    return init.endswith("+zero")


def zero(*layers: nn.Module) -> None:
    """Set all parameters to zero, in place."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()


def check_init(init: str) -> None:
    """Check a name.

    Raises:
        ValueError: If there is no such initialisation; lists those there are.
    """
    names = Init.__args__  # type: ignore[attr-defined]
    if init not in names:
        raise ValueError(f"unknown init {init!r}: choose from {', '.join(names)}")
