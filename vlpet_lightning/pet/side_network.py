"""Contract of side networks: modules beside the backbone that read its layers and compute the model's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from vlpet_lightning.pet.operations import Activations, Operations, Tokens
from vlpet_lightning.pet.unit import Unit

Step = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # as in vlpet_lightning.beam_search


class Network(Protocol):
    """A way to compute encoder and decoder states with a language model: the backbone's own, or a side network's.

    The arguments are those of the methods of :class:`vlpet_lightning.backbones.base.Backbone`. ``states`` is passed
    from :meth:`encode` to the other two as it is.
    """

    def encode(self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: Any = None) -> Any:
        """Run the encoder."""

    def decode(self, lm: Any, states: Any, mask: Tensor, decoder_inputs: Tensor, prefix: Any = None) -> Tensor:
        """Run the decoder under teacher forcing."""

    def step(self, lm: Any, states: Any, mask: Tensor, prefix: Any, logits: Callable[[Tensor], Tensor]) -> Step:
        """Return decoder steps with a cache, for generation."""

    def operations(self, lm: Any) -> Operations:
        """Yield the operations of a training step in the order of execution, up to the states that `decode` returns."""


class Host(Network, Protocol):
    """The parts of a backbone that side networks use."""

    def stack(self, lm: Any, name: str) -> Any:
        """Return the encoder or decoder."""

    def stack_layers(self, stack: Any) -> Sequence[nn.Module]:
        """Return the layers of an encoder or decoder."""

    def stack_embedding(self, stack: Any) -> nn.Module:
        """Return the module whose output is the embedded text, before dropout."""

    def narrow_stack(self, lm: Any, name: str, reduction: int, layers: int) -> nn.Module:
        """Build a stack whose widths are divided by a number, without embeddings."""

    def pruning_chains(self, lm: Any) -> list[list[tuple[str, ...]]]:
        """Return the layers in the order in which structured pruning passes through them."""

    def token_embedding(self, lm: Any) -> Tensor:
        """Return the token embedding's weight."""

    def run_encoder(self, lm: Any, encoder: Any, hidden: Tensor, text: int, mask: Tensor) -> Tensor:
        """Run the layers of an encoder over embedded text and image tokens."""

    def run_decoder(self, lm: Any, decoder: Any, states: Tensor, mask: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run a decoder under teacher forcing."""

    def cached_decoder(
        self,
        lm: Any,
        decoder: Any,
        states: Tensor,
        mask: Tensor,
        inputs: Callable[[Tensor], Mapping[str, Tensor]],
        output: Callable[[Tensor], Tensor],
    ) -> Step:
        """Return steps of a decoder with a cache."""

    def operations(self, lm: Any, tokens: Tokens = "source") -> Operations:
        """Yield the operations of encoder and decoder; ``text`` tokens if the encoder reads no image tokens."""

    def stack_operations(
        self, stack: Any, name: str, tokens: Tokens, inputs: tuple[str, ...] = (), memory: Activations | None = None
    ) -> Operations:
        """Yield the operations of a stack."""


class SideNetwork(Unit):
    """A network beside the backbone, placed at ``side``; a :class:`Network` that computes the states of the model.

    The backbone is frozen, and nothing is back-propagated through it. The constructor receives the width ``d`` of the
    backbone, and :meth:`build` the backbone itself.
    """

    unmergeable = "it is a network of its own beside the backbone"

    def build(self, backbone: Host, lm: Any) -> None:
        """Create the parts that depend on the backbone's layers, and connect to them; called once.

        Args:
            backbone: Description of the language model's architecture.
            lm: Language model.

        Raises:
            ValueError: If the settings do not fit the backbone. The language model is not changed then.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(backbone, lm)")

    def encode(self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: Any = None) -> Any:
        """Run both encoders; see :class:`Network`."""
        raise NotImplementedError(f"{type(self).__name__} must define encode")

    def decode(self, lm: Any, states: Any, mask: Tensor, decoder_inputs: Tensor, prefix: Any = None) -> Tensor:
        """Run both decoders; returns states ``(B, L, d)`` for the vocabulary projection. See :class:`Network`."""
        raise NotImplementedError(f"{type(self).__name__} must define decode")

    def step(self, lm: Any, states: Any, mask: Tensor, prefix: Any, logits: Callable[[Tensor], Tensor]) -> Step:
        """Return steps of both decoders; see :class:`Network`."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def operations(self, lm: Any) -> Operations:
        """Yield the operations of both networks; see :class:`Network`."""
        raise NotImplementedError(f"{type(self).__name__} must define operations")

    def check_trained(self, rules: Mapping[str, Collection[str]]) -> None:
        """Check that no parameter of the backbone is trained.

        Raises:
            ValueError: If one is; the message names the rule.
        """
        for rule, names in rules.items():
            inside = [name for name in names if name.startswith("lm.")]
            if inside and rule == "pet":  # no unit is in the language model, so that they are of another library
                raise ValueError(
                    f"a method of Hugging Face peft beside a {type(self).__name__}: nothing is back-propagated through "
                    "the backbone, so that it could not be trained; remove peft, or the side network"
                )
            if inside:
                raise ValueError(
                    f"trainable rule {rule!r} selects {len(inside)} tensors of the backbone, but nothing is "
                    f"back-propagated through the backbone of a {type(self).__name__}: remove the rule"
                )

    def start_as_identity(self) -> None:
        """Raise ValueError: the output of the backbone's decoder is not used, so no initialisation preserves it."""
        raise ValueError(
            f"{type(self).__name__} has no identity start (it replaces the backbone's output): use `start: original`"
        )
