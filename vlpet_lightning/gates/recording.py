"""Record the factors ``G`` of a model's gates during a forward pass, without changing its output.

Factors are read by forward hooks on the gates, which exist only while recording. The compiled graphs of a model stay as
they are: its layers are recorded eagerly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlpet_lightning.backbones.sequence import LAYOUT
from vlpet_lightning.batch import IGNORED, Batch
from vlpet_lightning.compilation import uncompiled
from vlpet_lightning.pet import Gate, Injected, PerTask, SelfGated, SmallGate, Unit

KINDS = ("prompt", "text", "image", "padding")  # of encoder positions
TARGET_KINDS = ("target", "padding")  # of decoder positions
SEQUENCE_KINDS = (*LAYOUT, "answer", "padding")  # of a decoder-only model's positions
OUTSIDE = ("vision", "projector")  # not in the sequence: gates at these sites are not recorded
OF_MEMORY = ("decoder.cross.key", "decoder.cross.value", "decoder.cross.memory")  # read the encoder's output


class Recordable(Protocol):
    """The parts of :class:`vlpet_lightning.model.VLModel` that recording needs; importing it would be circular."""

    injected: list[Injected]
    graphs: Any
    backbone: Any
    lm: Any

    @property
    def enabled(self) -> bool: ...
    def layers(self) -> list[nn.Module]: ...
    def prompt(self, stack: str) -> Any: ...
    def mask(self, batch: Batch) -> Tensor: ...
    def encode(self, batch: Batch) -> Tensor: ...
    def decode(self, batch: Batch, decoder_inputs: Tensor) -> Tensor: ...
    def decoder_states(self, batch: Batch, decoder_inputs: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """A gate of an inserted unit.

    Args:
        site: Name of its site; with the name of the gate if the unit has several.
        layer: Index of its layer.
        gate: The gate, or a unit that is its own gate.
        hooked: Module whose output determines the factors.
        read: Function from this output to the factors.
        single: Whether the model has one stack, which sees the whole sequence in one pass.
        unit: The unit that the gate is part of.
    """

    site: str
    layer: int
    gate: nn.Module
    hooked: nn.Module
    read: Callable[[Tensor], Tensor]
    single: bool = False
    unit: Unit | None = None

    def positions(self) -> Tensor | None:
        """Return the indices of the positions that the unit acts on in the current batch; None for all."""
        if self.unit is None or self.unit.positions == "all":
            return None
        context = self.unit.context
        if context is None or context.positions is None:
            raise RuntimeError(f"{type(self.unit).__name__} at {self.site} has no positions outside a batch")
        return context.positions[self.unit.positions]

    @property
    def stack(self) -> str:
        """Name of the stack whose positions the gate sees; ``sequence`` in a decoder-only model."""
        if self.single:
            return "sequence"
        place = self.site.partition(":")[0]
        return "encoder" if place in OF_MEMORY else place.partition(".")[0]

    def axes(self, factors: Tensor, positions: int) -> tuple[str, ...]:
        """Return the axes of ``(sample, token, channel)`` along which factors can differ.

        Args:
            factors: Tensor that broadcasts over ``(B, S, d)``.
            positions: ``S``.
        """
        if isinstance(self.gate, SmallGate):
            return ("sample",)
        shape = [1] * (3 - factors.dim()) + list(factors.shape)
        tokens = factors.dim() > 1 and shape[1] == positions
        found = {"sample": factors.dim() == 3, "token": tokens, "channel": shape[2] > 1}
        return tuple(name for name, there in found.items() if there)


class Recorded(NamedTuple):
    """Factors of one gate.

    Args:
        source: The gate.
        factors: Tensor that broadcasts over ``(B, S, d)``, without gradient.
        positions: Indices of these ``S`` positions in the sequence; None for the whole sequence.
    """

    source: Source
    factors: Tensor
    positions: Tensor | None = None


@dataclass
class Gates:
    """Factors of all gates in one forward pass.

    Args:
        task: Task of the batch.
        factors: ``G`` by site and layer, as it broadcasts over ``h``: ``(B, S, d)`` for the large gate, ``(B, S, 1)``
            for middleX, ``(d,)`` for middleY, and ``(B, 1, 1)`` for small. A scale of the unit on the whole branch
            (0.3 in the T5 recipe) is not part of ``G``. ``S`` counts the positions that the unit acts on.
        kinds: ``(B, S)`` bool masks of the encoder positions by kind: ``prompt``, ``text`` (the task prompt included),
            ``image`` and ``padding``; every position has exactly one kind. In a decoder-only model, the whole sequence
            with its answer, of kinds ``prompt``, ``template``, ``image``, ``text``, ``answer`` and ``padding``.
        target_kinds: The same for the ``(B, L)`` decoder positions: ``target`` and ``padding``; empty in a decoder-only
            model.
        images: Number ``N`` of images per sample.
        image_positions: ``(V,)`` indices of the image positions, one image after the other; of an image with tiles,
            those of the view of the whole image.
        sources: The gates by site and layer.
        positions: Indices of the positions of units that are limited to some, by site and layer.
    """

    task: str
    factors: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    kinds: dict[str, Tensor] = field(default_factory=dict)
    target_kinds: dict[str, Tensor] = field(default_factory=dict)
    images: int = 1
    image_positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    sources: dict[tuple[str, int], Source] = field(default_factory=dict)
    positions: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def kinds_at(self, site: str) -> dict[str, Tensor]:
        """Return the masks of the positions that the gates of a site see."""
        key, source = next((key, source) for key, source in self.sources.items() if key[0] == site)
        return self.kinds_of(source, self.positions.get(key))

    def kinds_of(self, source: Source, positions: Tensor | None) -> dict[str, Tensor]:
        """Return the masks of the positions that a gate sees; of all or of some ``positions`` of its stack."""
        kinds = self.target_kinds if source.stack == "decoder" else self.kinds
        return kinds if positions is None else {kind: mask[:, positions] for kind, mask in kinds.items()}

    def images_among(self, positions: Tensor | None) -> Tensor:
        """Return the indices of the image positions among some sorted positions, or among all."""
        return self.image_positions if positions is None else torch.searchsorted(positions, self.image_positions)

    def on_images(self, site: str, layer: int) -> Tensor:
        """Return ``(B, N, side, side)`` means of ``G`` over the channels, on the grid of each image.

        Raises:
            ValueError: If the gate does not see image positions one by one, or the images have no square grid.
        """
        factors, source = self.factors[site, layer], self.sources[site, layer]
        limited = self.positions.get((site, layer))
        positions = self.kinds_of(source, limited)["padding"].shape[1]
        if source.stack == "decoder" or "token" not in source.axes(factors, positions):
            raise ValueError(f"{type(source.gate).__name__} at {site} has no factors for the positions of an image")
        tokens = len(self.image_positions) // self.images
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"{tokens} tokens per image are no square grid: use factors and kinds instead")
        return factors.mean(dim=-1)[:, self.images_among(limited)].reshape(-1, self.images, side, side)

    def add(self, recorded: Recorded) -> None:
        """Add the factors of a gate."""
        key = recorded.source.site, recorded.source.layer
        self.factors[key], self.sources[key] = recorded.factors, recorded.source
        if recorded.positions is not None:
            self.positions[key] = recorded.positions


def sources_of(injected: Sequence[Injected], single: bool = False) -> list[Source]:
    """Return the gates of inserted units that have factors, in the order of the units.

    Those in the vision tower and at the projector of a decoder-only model are left out.

    Args:
        injected: The units.
        single: Whether the model has one stack.
    """
    found = []
    for place in injected:
        if _outside(place.site):
            continue
        named: dict[str, list[nn.Module]] = {}
        for name, gate in _gates(place.unit):
            named.setdefault(_label(place.unit, name), []).append(gate)
        for label, gates in named.items():
            site = place.site if len(named) == 1 else f"{place.site}:{label}"
            found += [Source(site, place.layer, gate, *_reading(gate), single, place.unit) for gate in gates]
    return found


def _outside(site: str) -> bool:
    return site.partition(".")[0] in OUTSIDE


def _gates(unit: Unit) -> Iterator[tuple[str, nn.Module]]:
    for name, module in unit.named_modules():
        factored = isinstance(module, Gate) and type(module).forward is not Gate.forward  # norms have no factors
        if factored or isinstance(module, SelfGated):
            yield name, module


def _label(unit: Unit, name: str) -> str:
    """Return the name of a gate in its unit; a unit per task has one at a time."""
    return ".".join(name.split(".")[2:]) if isinstance(unit, PerTask) else name


def _reading(gate: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if isinstance(gate, SelfGated):
        return gate.up, torch.sigmoid  # its update is the argument of its sigmoid
    return gate, lambda factors: factors


def check_gated(model: Recordable) -> list[Source]:
    """Return the gates of a model.

    Raises:
        ValueError: If it has none, or its units are disabled.
    """
    found = sources_of(model.injected, single=not model.backbone.has_encoder)
    if not found:
        outside = sorted({p.site for p in model.injected if _outside(p.site) and any(_gates(p.unit))})
        if outside:
            raise ValueError(
                f"the model has gates at {', '.join(outside)} alone, which are not recorded: place some in the decoder"
            )
        units = sorted({type(place.unit).__name__ for place in model.injected})
        norms = {type(m).__name__ for p in model.injected for m in p.unit.modules() if isinstance(m, Gate)}
        has = f"units {', '.join(units)}" if units else "no units"
        has += f", whose {', '.join(sorted(norms))} has no factors" if norms else ""
        raise ValueError(
            f"the model has no gates to record: it has {has}; use a method with gates, e.g. "
            "experiments/pet/vlpet_large.yaml"
        )
    if not model.enabled:
        raise ValueError("the units are disabled, so that no gate is computed: set model.enabled to True")
    return found


@contextmanager
def recording(sources: Sequence[Source], take: Callable[[Recorded], None]) -> Iterator[None]:
    """Pass the factors of each gate on when they are computed.

    Gates of the decoder beside an encoder follow at the end of the block: a prompt is a pass of its own through the
    decoder, and two projections of the same input call their unit twice.

    Args:
        sources: Gates, from :func:`sources_of`.
        take: Function of a gate's factors; keeping none of them needs no memory.
    """
    later: dict[Source, Recorded] = {}

    def hook(source: Source) -> Callable[[nn.Module, Any, Tensor], None]:
        def see(module: nn.Module, args: Any, output: Tensor) -> None:
            recorded = Recorded(source, source.read(output.detach()), source.positions())
            if source.single or source.site.startswith("encoder."):
                take(recorded)
            else:
                later[source] = recorded

        return see

    handles = [source.hooked.register_forward_hook(hook(source)) for source in sources]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for recorded in later.values():
        take(recorded)


def token_kinds(mask: Tensor, text: int, image: int) -> dict[str, Tensor]:
    """Return ``(B, S)`` bool masks of the encoder positions by kind.

    Args:
        mask: ``(B, S)`` bool, true on real positions; all others are padding, frames that pad a short clip included.
        text: Index of the first text position.
        image: Index of the first image position.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    return {
        "prompt": mask & (place < text),
        "text": mask & (place >= text) & (place < image),
        "image": mask & (place >= image),
        "padding": ~mask,
    }


def target_kinds(batch: Batch) -> dict[str, Tensor]:
    """Return ``(B, L)`` bool masks of the decoder positions by kind; empty without labels."""
    if batch.labels is None:
        return {}
    real = batch.labels != IGNORED
    return {"target": real, "padding": ~real}


def sequence_kinds(layout: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return ``(B, S + L)`` bool masks of a decoder-only model's positions by kind.

    The decoder's first input is the template's last token; each of the others is the answer's token before.

    Args:
        layout: ``(S,)`` indices into :data:`SEQUENCE_KINDS`, of the positions before the decoder's inputs.
        mask: ``(B, S)`` bool, true on real positions.
        labels: ``(B, L)`` labels.
    """
    inputs = torch.full(labels.shape[1:], SEQUENCE_KINDS.index("answer"), device=mask.device)
    inputs[:1] = SEQUENCE_KINDS.index("template")
    layout = torch.cat([layout.to(mask.device), inputs])
    mask = torch.cat([mask, labels != IGNORED], dim=1)
    found = {kind: mask & (layout == index) for index, kind in enumerate(SEQUENCE_KINDS[:-1])}
    return found | {"padding": ~mask}


def empty_record(model: Recordable, batch: Batch) -> Gates:
    """Return a record of a batch without factors; the batch of a decoder-only model needs labels."""
    images = 1 if batch.features.dim() == 3 else batch.features.shape[1]
    if not model.backbone.has_encoder:
        learned = model.prompt("decoder")
        length = 0 if learned is None else learned.length
        layout = model.backbone.layout(model.lm.config, images, batch.input_ids.shape[1], length)
        kinds = sequence_kinds(layout, model.mask(batch), batch.labels)  # type: ignore[arg-type]
        whole = model.backbone.whole_images(model.lm.config, images, length)
        return Gates(batch.task, kinds=kinds, images=images, image_positions=whole.to(batch.input_ids.device))
    prompt = model.prompt("encoder")
    text = 0 if prompt is None else prompt.length
    first = text + batch.input_ids.shape[1]
    mask = model.mask(batch)
    positions = torch.arange(first, mask.shape[1])
    return Gates(batch.task, {}, token_kinds(mask, text, first), target_kinds(batch), images, positions)


def decode_with_gates(model: Recordable, batch: Batch, decoder_inputs: Tensor) -> tuple[Tensor, Gates]:
    """Compute logits as ``model.decode`` does, and the factors of all gates.

    A compiled model, or one with CUDA graphs, computes its logits as always and its factors in a second, eager pass,
    whose dropout differs in training.

    Raises:
        ValueError: If the model has no gates.
    """
    sources = check_gated(model)
    gates = empty_record(model, batch)
    if model.graphs is None and model.layers()[0]._compiled_call_impl is None:
        with recording(sources, gates.add):
            return model.decode(batch, decoder_inputs), gates
    logits = model.decode(batch, decoder_inputs)
    devices = [decoder_inputs.device] if decoder_inputs.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad(), uncompiled(model.layers()), recording(sources, gates.add):
        model.decoder_states(batch, decoder_inputs)
    return logits, gates


@torch.no_grad()
def encode_with_gates(model: Recordable, batch: Batch) -> Gates:
    """Compute the factors of the encoder's gates; the batch needs no labels.

    Raises:
        ValueError: If the model has no gates in its encoder.
    """
    sources = [source for source in check_gated(model) if source.site.startswith("encoder.")]
    if not sources:
        raise ValueError(
            "the model has gates in its decoder only: call model(batch, return_gates=True) with a batch that has labels"
        )
    gates = empty_record(model, batch)
    with uncompiled(model.layers()), recording(sources, gates.add):
        model.encode(batch)
    return gates
