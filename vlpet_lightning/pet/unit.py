"""Base class of all PET methods that act inside a layer: ``unit(x, h) -> h``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

INIT_STD = 0.02  # BART's init_std: its _init_weights also initialises the modules that the original adds to it

# How fresh weights are drawn: `normal` is N(0, 0.02) with biases 0, as the original's modules inside BART;
# `uniform` is torch's default U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, as they keep inside T5.
# `+zero` sets the last layer to zero, weights and biases (src/trainer_base.py: weight_initialization).
Init = Literal["normal", "uniform", "normal+zero", "uniform+zero"]

# Positions of a decoder-only model's sequence at which a unit acts: those before the answer, all, or image tokens.
Positions = Literal["prefix", "all", "image"]


@dataclass(frozen=True)
class Context:
    """Information about the batch for units that need more than their input.

    Args:
        task: Name of the batch's task.
        mask: ``(B, S)`` bool, true on real encoder positions, or None if padding counts like any other position.
        positions: Indices of the ``prefix`` and ``image`` positions in the sequence, for units that are limited to
            them; None if none of these is computed, as in the steps of generation after the first.
    """

    task: str
    mask: Tensor | None = None
    positions: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Place:
    """The position of a unit.

    Args:
        site: Name in the backbone's table of sites.
        stack: ``encoder`` or ``decoder``.
        layer: Index of the layer in its stack.
        layers: Number of layers of the stack.
    """

    site: str
    stack: str
    layer: int
    layers: int


Built = TypeVar("Built", bound="Configurable")


class Configurable:
    """Base class of units and gates, which placements receive as factories."""

    @classmethod
    def with_(cls: type[Built], **settings: Any) -> partial[Built]:
        """Return a factory of this class with some settings; the width is left to the site.

        >>> from vlpet_lightning.pet import LoRA
        >>> LoRA.with_(rank=4)(32).lora_A
        Linear(in_features=32, out_features=4, bias=False)

        Args:
            settings: Keyword arguments of the constructor, which is called when a model is built.

        Raises:
            ValueError: If the class has no such setting; lists the valid names.
        """
        _width, *others = inspect.signature(cls).parameters.values()
        known = [parameter.name for parameter in others]
        unknown = sorted(set(settings) - set(known))
        if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in others):
            raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}: it has {', '.join(known) or 'none'}")
        return partial(cls, **settings)


class Unit(Configurable, nn.Module):
    """A PET module at one site of one layer.

    ``x`` ``(B, S, d)`` is the sublayer's input; ``h`` ``(B, S, d)`` is its output after the last projection and before
    dropout, residual and norm. ``forward(x, h)`` returns the new ``h``.

    Attributes:
        needs_context: Set on a class of units, or of parts of units, that reads ``context``.
        context: The current batch's :class:`Context`; the model sets it before each forward if ``needs_context``.
        positions: Positions at which the unit acts; set by :meth:`limit_to`.
        may_skip_parameters: A step may leave some of its parameters without a gradient (modules of other tasks),
            so that DistributedDataParallel has to search for them.
        needs_linear: The unit computes with the weight of the linear layer at its site, passed to :meth:`bind`.
        adds_tokens: The unit prepends tokens to a stack's input, and is placed at a prompt site.
        tasks: Names of the tasks that the unit has parts for; empty if it serves any task.
        reads_other_positions: The output at a position depends on other positions, so that the unit must not act on an
            answer that is generated token by token. Parts of units may set it, too.
        ranks: Names of the integer constructor arguments that set the unit's size, which ``budget`` searches; those
            that a class does not have are ignored.
        unmergeable: Reason why the unit cannot be merged into its linear layer.
    """

    needs_context = False
    context: Context | None = None
    positions: Positions = "all"
    may_skip_parameters = False
    needs_linear = False
    adds_tokens = False
    reads_other_positions = False
    tasks: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ("rank",)
    unmergeable = "it is not a linear map of the sublayer's input"

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, h)")

    def limit_to(self, positions: Positions) -> None:
        """Limit the unit to some positions of the sequence."""
        self.positions = positions
        self.reads_context = self.needs_context  # for more than its positions
        self.needs_context = self.needs_context or positions != "all"

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        """Apply ``forward`` to the unit's positions alone; ``h`` is unchanged at all others.

        Raises:
            RuntimeError: If the unit is limited to some positions and no batch is being processed.
        """
        if self.positions == "all":
            return self(x, h)
        if self.context is None:
            raise RuntimeError(
                f"{type(self).__name__} at {self.positions} positions was called without a batch: call the whole model"
            )
        if self.context.positions is None:
            return h
        index = self.context.positions[self.positions]
        changed = self(x.index_select(1, index), h.index_select(1, index))
        return h.index_copy(1, index, changed.to(h.dtype))

    def join(self, place: Place, shared: nn.ModuleDict) -> None:
        """Hook that is called once, when the position of the unit is known.

        Args:
            place: Site and layer.
            shared: Modules shared by all units of the model, by name: use an existing one, or add it.
        """

    def bind(self, linear: nn.Linear) -> None:
        """Hook that is called once, after injection, if ``needs_linear``.

        Args:
            linear: The layer whose input and output are the unit's ``x`` and ``h``.
        """

    def map_to(self, width: int) -> None:
        """Hook that is called once, before training, if ``h`` is of another width than ``x``.

        This is the case at keys and values of grouped-query attention.

        Args:
            width: Number of channels of ``h``; the constructor got that of ``x``.

        Raises:
            ValueError: If the unit needs equal widths.
        """
        raise ValueError(
            f"{type(self).__name__} needs equal widths: place a unit there that maps one to another, such as LoRA or "
            "ParallelAdapter"
        )

    def start_from_backbone(self, backbone: Any, lm: Any, vocabulary: int) -> None:
        """Hook that is called when a model is built for training, to initialise the unit from the pretrained weights.

        Args:
            backbone: Description of the language model's architecture.
            lm: Language model with its pretrained weights.
            vocabulary: Number of token embedding rows that are pretrained; the others are fresh.
        """

    def check_trained(self, rules: Mapping[str, Collection[str]]) -> None:
        """Hook that is called once the trained parameters are known.

        Args:
            rules: Names of the trained parameters by rule.

        Raises:
            ValueError: If the unit cannot be trained together with them.
        """

    def compiled_layers(self) -> list[nn.Module]:
        """Return layers of the unit's own that ``compile_model`` compiles, beside those of the backbone."""
        return []

    @property
    def is_identity(self) -> bool:
        """Whether a fresh unit with these settings returns ``h`` exactly."""
        return False

    def start_as_identity(self) -> None:
        """Re-initialise so that the first forward returns ``h`` exactly (the corrected protocol's start)."""
        raise ValueError(f"{type(self).__name__} has no identity start: use `start: original`")

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of a gate, which are counted and can be exempt from weight decay separately."""
        return []

    def merge(self, linear: nn.Linear, *, side: Literal["input", "output"] = "output") -> None:
        """Merge the unit into its linear layer in place, if that is exact.

        Args:
            linear: The layer whose input (``side="input"``) or output the unit acts on.
            side: Side of the layer that the unit acts on.

        Raises:
            ValueError: If it cannot be merged; gives the reason.
        """
        raise ValueError(f"{type(self).__name__} cannot be merged: {self.unmergeable}")


UnitFactory = Callable[[int], Unit]  # called once per layer with the feature dimension at the site


def linear(inputs: int, outputs: int, init: Init = "normal") -> nn.Linear:
    """Build a linear layer with a bias."""
    check_init(init)
    layer = nn.Linear(inputs, outputs)
    if init.startswith("normal"):
        nn.init.normal_(layer.weight, std=INIT_STD)
        nn.init.zeros_(layer.bias)
    return layer


def last_linear(inputs: int, outputs: int, init: Init = "normal") -> nn.Linear:
    """Build the last linear layer of a unit, which is zero for the ``+zero`` initialisations."""
    layer = linear(inputs, outputs, init)
    if starts_at_zero(init):
        zero(layer)
    return layer


def starts_at_zero(init: Init) -> bool:
    """Return whether the last layer starts at zero."""
    return init.endswith("+zero")


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return ``factor * tensor``, without the multiplication if the factor is 1."""
    return tensor if factor == 1.0 else factor * tensor


def zero(*layers: nn.Module) -> None:
    """Set all parameters to zero, in place."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()


def check_init(init: str) -> None:
    """Check the name of an initialisation.

    Raises:
        ValueError: If it is unknown; lists the valid names.
    """
    names = Init.__args__  # type: ignore[attr-defined]
    if init not in names:
        raise ValueError(f"unknown init {init!r}: choose from {', '.join(names)}")
