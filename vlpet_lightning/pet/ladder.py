"""Ladder Side-Tuning: a narrow network beside the backbone (Sung et al., NeurIPS 2022; ylsung/Ladder-Side-Tuning)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import above_zero, choice, positive
from vlpet_lightning.pet.operations import Activations, Applied, Operations, Tokens
from vlpet_lightning.pet.pruning import Importance, prune
from vlpet_lightning.pet.side_network import Host, SideNetwork, Step
from vlpet_lightning.pet.unit import Init, linear

STACKS = ("encoder", "decoder")


class LadderStates(NamedTuple):
    """Output of both encoders.

    Args:
        text: ``(B, T, d)`` states of the backbone, which reads text alone.
        side: ``(B, S, w)`` states of the side network over text and image tokens.
    """

    text: Tensor
    side: Tensor


class Tap:
    """Forward hook that keeps the output of a module until it is read."""

    def __init__(self) -> None:
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output[0] if isinstance(output, tuple) else output

    def read(self) -> Tensor:
        """Return the output, and forget it."""
        output, self.output = self.output, None
        if output is None:
            raise RuntimeError("the side network was run before the backbone")
        return output


class Rung(nn.Module):
    """Input of one side layer: ``g s + (1 - g) [down(b); 0]`` with ``g = sigmoid(a / temperature)``.

    It is a forward pre-hook of the side layer. ``s`` ``(B, S, w)`` is the input of the layer and ``b`` ``(B, T, d)``
    the output of a layer of the backbone; the zeros stand at image tokens.

    Args:
        width: ``d``.
        narrow: ``w``.
        first: Whether ``s`` is still of width ``d`` and is projected first.
        temperature: Divisor of the gate's logit ``a``, which starts at 0.
        init: Initialisation of the projections.
    """

    def __init__(self, width: int, narrow: int, *, first: bool, temperature: float, init: Init) -> None:
        super().__init__()
        self.first: nn.Module = linear(width, narrow, init) if first else nn.Identity()
        self.down = linear(width, narrow, init)
        self.gate = nn.Parameter(torch.zeros(1))
        self.temperature = temperature
        self.tap = Tap()

    def forward(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the positional arguments of the side layer."""
        side, below = self.first(args[0]), self.down(self.tap.read())
        gate = torch.sigmoid(self.gate / self.temperature)
        below = (1 - gate) * below  # padded after the product, which saves its input for the gate's gradient
        return gate * side + F.pad(below, (0, 0, 0, side.shape[1] - below.shape[1])), *args[1:]


class Ladder(nn.Module):
    """Side layers beside one stack of the backbone.

    Args:
        backbone: Description of the language model's architecture.
        lm: Language model.
        name: ``encoder`` or ``decoder``.
        reduction: Divisor of all widths.
        beside: Indices of the backbone's layers that have a side layer.
        rung: Builds the input of a side layer; called with whether it is the first one.
    """

    def __init__(
        self, backbone: Host, lm: Any, name: str, reduction: int, beside: Sequence[int], rung: Callable[[bool], Rung]
    ) -> None:
        super().__init__()
        self.stack = backbone.narrow_stack(lm, name, reduction, len(beside))
        self.rungs = nn.ModuleList(rung(number == 0) for number in range(len(beside)))
        self.embedded = Tap()

    def connect(self, backbone: Host, stack: Any, beside: Sequence[int]) -> None:
        """Register the hooks that connect this ladder to a stack of the backbone."""
        backbone.stack_embedding(stack).register_forward_hook(self.embedded)
        layers = backbone.stack_layers(stack)
        for index, layer, rung in zip(beside, backbone.stack_layers(self.stack), self.rungs, strict=True):
            layers[index].register_forward_hook(rung.tap)  # type: ignore[arg-type]
            layer.register_forward_pre_hook(rung)


class LadderSideNetwork(SideNetwork):
    """Ladder Side-Tuning (section 3 of the paper; VL-T5/src/modeling_t5.py and my_transformers/modeling_t5.py there).

    Layers of the backbone's own kind with all widths divided by ``reduction`` run beside its layers, in the encoder and
    the decoder. Side layer ``i`` reads the output of the backbone's layer ``i`` through a :class:`Rung`. The backbone
    reads text alone; image tokens exist in the side network alone. The side decoder's output is projected back to the
    width of the backbone for its frozen vocabulary projection. The backbone's own decoder output is not used.

    Args:
        width: Number of channels ``d`` of the backbone.
        reduction: Divisor of all widths (``--side_reduction_factor``).
        encoder_layers: Indices of the encoder layers that have a side layer; null for all.
        decoder_layers: The same for the decoder.
        temperature: Divisor of the gates' logits (``gate_T``).
        init: Initialisation of the projections between backbone and side network.
        start: Initial weights of the side layers. ``pruned`` takes the most important rows and columns of the
            backbone's matrices (:mod:`vlpet_lightning.pet.pruning`); ``fresh`` draws them as the backbone's own.
        importance: File written by the command ``importance``, for ``start: pruned``; null uses the magnitude of the
            weights.
    """

    ranks = ()

    def __init__(
        self,
        width: int,
        *,
        reduction: int = 4,
        encoder_layers: list[int] | None = None,
        decoder_layers: list[int] | None = None,
        temperature: float = 0.1,
        init: Init = "normal",
        start: Literal["pruned", "fresh"] = "pruned",
        importance: str | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.reduction = positive("reduction", reduction)
        if width % reduction:
            raise ValueError(f"a reduction of {reduction} does not divide the backbone's width of {width}")
        self.beside = {"encoder": encoder_layers, "decoder": decoder_layers}
        self.temperature = above_zero("temperature", temperature)
        self.init: Init = init
        self.start = choice("start", start, ("pruned", "fresh"))
        self.importance = importance
        if start == "fresh" and importance is not None:
            raise ValueError(f"importance is {importance}, but a fresh start prunes nothing: omit one of them")
        self.up = linear(width // reduction, width, init)

    def build(self, backbone: Host, lm: Any) -> None:
        self.backbone = backbone
        layers = {name: backbone.stack_layers(backbone.stack(lm, name)) for name in STACKS}
        self.side_layers = {name: _checked(name, self.beside[name], len(layers[name])) for name in STACKS}
        ladders = {
            name: Ladder(backbone, lm, name, self.reduction, self.side_layers[name], self._rung) for name in STACKS
        }
        self.encoder, self.decoder = ladders.values()
        for name, ladder in ladders.items():
            ladder.connect(backbone, backbone.stack(lm, name), self.side_layers[name])

    def _rung(self, first: bool) -> Rung:
        narrow = self.width // self.reduction
        return Rung(self.width, narrow, first=first, temperature=self.temperature, init=self.init)

    @property
    def _ladders(self) -> dict[str, Ladder]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    # computing -----------------------------------------------------------------------------------------------------

    def encode(self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: Any = None) -> LadderStates:
        length = input_ids.shape[1]
        text = self.backbone.encode(lm, input_ids, visual[:, :0].detach(), mask[:, :length])
        hidden = self.encoder.embedded.read()
        hidden = torch.cat([hidden, visual.to(hidden.dtype)], dim=1)
        return LadderStates(text, self.backbone.run_encoder(lm, self.encoder.stack, hidden, length, mask))

    def decode(self, lm: Any, states: LadderStates, mask: Tensor, decoder_inputs: Tensor, prefix: Any = None) -> Tensor:
        self.backbone.decode(lm, states.text, mask[:, : states.text.shape[1]], decoder_inputs)
        inputs = {"inputs_embeds": self.decoder.embedded.read()}
        return self.up(self.backbone.run_decoder(lm, self.decoder.stack, states.side, mask, inputs))

    def step(
        self, lm: Any, states: LadderStates, mask: Tensor, prefix: Any, logits: Callable[[Tensor], Tensor]
    ) -> Step:
        below = self.backbone.step(lm, states.text, mask[:, : states.text.shape[1]], None, lambda hidden: hidden)
        beside = self.backbone.cached_decoder(
            lm,
            self.decoder.stack,
            states.side,
            mask,
            lambda tokens: {"inputs_embeds": self.decoder.embedded.read()},
            lambda hidden: logits(self.up(hidden)),
        )

        def step(sequences: Tensor, rows: Tensor | None, samples: Tensor | None) -> Tensor:
            below(sequences, rows, samples)
            return beside(sequences, rows, samples)

        return step

    def operations(self, lm: Any) -> Operations:
        yield from self.backbone.operations(lm, "text")
        yield from self._side_operations("encoder", "source", ("words", "images"), below="text")
        memory = Activations("side encoder", "source")
        yield from self._side_operations("decoder", "target", ("words",), below="target", memory=memory)
        yield Applied(self.up, "target", ("side decoder",), "side decoder")

    def _side_operations(
        self, name: str, tokens: Tokens, inputs: tuple[str, ...], *, below: Tokens, memory: Activations | None = None
    ) -> Operations:
        """Yield the operations beside one stack of the backbone, which reads the ``below`` tokens."""
        ladder, side = self._ladders[name], f"side {name}"
        for rung in ladder.rungs:
            yield Applied(rung.first, tokens, inputs, side)  # type: ignore[arg-type]
            yield Applied(rung.down, below, (name,), side)  # type: ignore[arg-type]
        yield from self.backbone.stack_operations(ladder.stack, side, tokens, memory=memory)

    # properties ----------------------------------------------------------------------------------------------------

    def compiled_layers(self) -> list[nn.Module]:
        return [layer for part in self._ladders.values() for layer in self.backbone.stack_layers(part.stack)]

    def gate_parameters(self) -> list[nn.Parameter]:
        return [rung.gate for part in self._ladders.values() for rung in part.rungs]  # type: ignore[misc]

    def extra_repr(self) -> str:
        beside = "".join(f", {name} {list(beside)}" for name, beside in self.beside.items() if beside is not None)
        return f"{self.width}->{self.width // self.reduction}, temperature={self.temperature}{beside}"

    # initial weights -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from_backbone(self, backbone: Host, lm: Any, vocabulary: int) -> None:
        """Copy the pruned layers of the backbone and its relative position bias, for ``start: pruned``.

        Raises:
            FileNotFoundError: If the importance file does not exist.
            ValueError: If it belongs to another backbone.
        """
        if self.start == "fresh":
            return
        weights = {name: parameter.detach() for name, parameter in lm.named_parameters()}
        if self.importance is None:
            importance = Importance.magnitude(weights, backbone.token_embedding(lm)[:vocabulary])
        else:
            importance = Importance.read(self.importance, weights)
        pruned = prune(weights, importance, backbone.pruning_chains(lm), self.reduction)
        names = {id(parameter): name for name, parameter in lm.named_parameters()}
        for side, parameter in self._counterparts(backbone, lm):
            side.copy_(pruned.get(names[id(parameter)], parameter))  # the position bias has a value per head

    def _counterparts(self, backbone: Host, lm: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Return the parameters of the side layers and norms, each with that of the backbone."""
        for stack, ladder in self._ladders.items():
            whole, narrow = backbone.stack(lm, stack), ladder.stack
            layers, beside = backbone.stack_layers(whole), self.side_layers[stack]
            inside: set[int] = set()
            for index, layer in zip(beside, backbone.stack_layers(narrow), strict=True):
                theirs, first = dict(layers[index].named_parameters()), dict(layers[0].named_parameters())
                for name, parameter in layer.named_parameters():
                    inside.add(id(parameter))
                    yield parameter, theirs.get(name, first[name])  # only T5's first layer has the position bias
            for name, parameter in narrow.named_parameters():
                if id(parameter) not in inside:
                    yield parameter, whole.get_parameter(name)


def _checked(name: str, beside: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """Return the layers of a stack that have a side layer.

    Raises:
        ValueError: If there are none, they are not in ascending order, or the stack lacks one of them.
    """
    if beside is None:
        return tuple(range(layers))
    wrong = [index for index in beside if index not in range(layers)]
    if wrong:
        raise ValueError(f"{name}_layers: there is no layer {wrong[0]}; the {name} has layers 0 to {layers - 1}")
    if not beside or list(beside) != sorted(set(beside)):
        raise ValueError(f"{name}_layers must name at least one layer, in ascending order, got {list(beside)}")
    return tuple(beside)
