"""Base class of backbones: layers, sites, and the joint encoding of text and image tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from vlpet_lightning.backbones.cached_decoder import CachedDecoder, beam_attention_in, token_inputs
from vlpet_lightning.backbones.masks import causal_mask
from vlpet_lightning.backbones.pretrained import PretrainedKind
from vlpet_lightning.backbones.visual import Projector
from vlpet_lightning.pet.operations import Activations, Applied, Attention, Operations, Tokens
from vlpet_lightning.pet.placement import AnySite
from vlpet_lightning.pet.side_network import Step

STACKS = ("encoder", "decoder")


class VocabularyProjection(NamedTuple):
    """How logits are computed from decoder states: ``softcap * tanh((head(scale * states) + bias) / softcap)``.

    Args:
        head: Layer from states to logits.
        bias: ``(vocabulary,)`` bias added to the output of the layer, or None.
        scale: Factor on the states.
        softcap: Bound of the logits' absolute value (Gemma 2), or None for logits without a bound.
    """

    head: nn.Module
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class Backbone(PretrainedKind):
    """Model-specific knowledge about an encoder-decoder language model, without weights.

    Attributes:
        sites: Sites at which units can be placed.
        added_vocabulary: Number of rows that the benchmark adds to the pretrained model's vocabulary.
        norm_places: Suffixes of the names of norms, by the sublayer that the norm belongs to.
        prompt_stack: Stack whose learned prompt is part of the sequence that :meth:`encode` builds.
    """

    norm_class: ClassVar[str] = "LayerNorm"  # end of the class name of norms
    has_encoder: ClassVar[bool] = True
    prompt_stack: ClassVar[str] = "encoder"
    sites: ClassVar[dict[str, AnySite]]
    added_vocabulary: ClassVar[int]
    norm_places: ClassVar[dict[str, str]]

    @property
    def refused_sites(self) -> dict[str, str]:
        """Reasons why units cannot be placed at some known sites, with the cure."""
        return {}

    def norm_endings(self, lm: Any, place: str) -> str | tuple[str, ...]:
        """Return the suffixes of the names of a sublayer's norms; none if no norm belongs to it."""
        return self.norm_places.get(place, ())

    def visual_embedding(self, lm: Any, feature_dim: int, grid: int | None, projector: Projector | None = None) -> Any:
        """Build the visual embedding with this backbone's norms and initialisation."""
        raise NotImplementedError

    def visual_parameters(self, lm: Any, visual: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that map features to image tokens, by their names in the whole model.

        Args:
            lm: Language model, whose names begin with ``lm.``.
            visual: Visual embedding, whose names begin with ``visual.``.
        """
        return {f"visual.{name}": parameter for name, parameter in visual.named_parameters()}

    def check_trained(self, rules: Mapping[str, Collection[str]]) -> None:
        """Check that the trained parameters can be trained.

        Args:
            rules: Names of the trained parameters by rule.

        Raises:
            ValueError: If a rule selects parameters that get no gradient.
        """

    def template_tokens(self, images: int) -> int | None:
        """Return the number of tokens that a prompt template adds to the sequence; None if it is not known.

        Args:
            images: Number of images.
        """
        return 0

    @property
    def reads_pixels(self) -> bool:
        """Whether the model runs a vision tower on the pixels of images, instead of reading stored features."""
        return False

    def tower_parts(self, lm: Any) -> Sequence[nn.Module]:
        """Return the modules of the vision tower, which training on stored features does not run; none without one."""
        return ()

    def tower_vectors(self, config: Any) -> int:
        """Return the number of vectors that the tower computes for an image."""
        return 0

    def unread(self, lm: Any) -> Sequence[nn.Module]:
        """Return modules of a vision tower that the library computes and does not use."""
        return ()

    def tower_attentions(self, config: Any) -> list[int]:
        """Return the work of the attention in each layer of the tower: width times the pairs of vectors that attend."""
        return []

    def visual_operations(self, lm: Any, visual: Any) -> Operations:
        """Yield the operations from features to image tokens."""
        for part in visual.feature.modules():
            yield Applied(part, "images", ("features",), "images")

    def mask(self, lm: Any, input_ids: Tensor, text: Tensor, images: Tensor, prompt: int) -> Tensor:
        """Return the ``(B, S)`` bool mask of the sequence that :meth:`encode` builds.

        Args:
            lm: Language model.
            input_ids: ``(B, T)`` token ids.
            text: ``(B, T)`` bool, true on real tokens.
            images: ``(B, V)`` bool, true on image tokens to attend to.
            prompt: Number of prompt tokens.
        """
        return torch.cat([text.new_ones(len(text), prompt), text, images], dim=1)

    def unit_positions(self, lm: Any, mask: Tensor, images: int, prompt: int) -> dict[str, Tensor]:
        """Return the indices of the positions that units can be limited to, by name.

        Args:
            lm: Language model.
            mask: Mask from :meth:`mask`.
            images: Number of image tokens.
            prompt: Number of learned prompt tokens.

        Available for decoder-only models.
        """
        raise NotImplementedError(self.kind)

    def layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        """Return the layers of each stack."""
        return {name: list(self.stack_layers(self.stack(lm, name))) for name in STACKS}

    def site_layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        """Return the modules that hold the sites of each :attr:`Site.stack <vlpet_lightning.pet.placement.Site>`."""
        return self.layers(lm)

    def stack_layers(self, stack: Any) -> Sequence[nn.Module]:
        """Return the layers of an encoder or decoder."""
        raise NotImplementedError

    def stack_embedding(self, stack: Any) -> nn.Module:
        """Return the module of an encoder or decoder whose output is the embedded text, before dropout."""
        raise NotImplementedError

    def narrow_stack(self, lm: Any, name: str, reduction: int, layers: int) -> nn.Module:
        """Build an encoder or decoder of this kind whose widths are divided by a number, for a side network.

        Its embeddings are left out: it reads embedded tokens.

        Args:
            lm: Language model.
            name: ``encoder`` or ``decoder``.
            reduction: Divisor of all widths; the number of heads stays the same.
            layers: Number of layers.

        Raises:
            ValueError: If a width is not a multiple of the divisor.
        """
        raise NotImplementedError

    def pruning_chains(self, lm: Any) -> list[list[tuple[str, ...]]]:
        """Return the names of the layers' modules in the order of :func:`vlpet_lightning.pet.pruning.prune`."""
        raise NotImplementedError

    def stack(self, lm: Any, name: str) -> Any:
        """Return the encoder or decoder."""
        return lm.get_submodule(self.stack_path(name))

    def stack_path(self, name: str) -> str:
        """Return the module name of the encoder or decoder within the language model."""
        raise NotImplementedError

    def prepare(self, lm: Any) -> None:
        """Add to a language model what its computation needs; called once, before units are inserted."""

    def token_embedding(self, lm: Any) -> Tensor:
        """Return the token embedding's weight, ``(vocabulary, d)``."""
        return lm.get_input_embeddings().weight

    def encode(self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: nn.Module | None = None) -> Any:
        """Run the joint encoder over ``[prompt, text, visual]``.

        Args:
            lm: Language model.
            input_ids: ``(B, T)`` token ids.
            visual: ``(B, V, d)`` visual tokens.
            mask: ``(B, S)`` bool, true on real positions.
            prompt: Unit that prepends its tokens to the embedded text.

        Returns:
            ``(B, S, d)`` encoder states.
        """
        raise NotImplementedError

    def run_encoder(self, lm: Any, encoder: Any, hidden: Tensor, text: int, mask: Tensor) -> Tensor:
        """Run the layers of an encoder.

        Args:
            lm: Language model.
            encoder: Its encoder, or one built by :meth:`narrow_stack`.
            hidden: ``(B, S, d)`` embedded prompt, text and image tokens, before dropout.
            text: Number of prompt and text tokens.
            mask: ``(B, S)`` bool, true on real positions.

        Returns:
            ``(B, S, width of the encoder)`` states.
        """
        raise NotImplementedError

    def decoder_prefix(self, lm: Any, tokens: Tensor) -> Any:
        """Fill a cache by running the decoder over embedded tokens ``(B, P, d)``, without the encoder's output.

        This follows the original (src/modeling_bart.py, VLBartModel.forward: ``decoder_prompt_config``).
        """
        mask = self.attention_mask(lm, causal_mask(tokens.shape[1], device=tokens.device))
        return self.stack(lm, "decoder")(inputs_embeds=tokens, attention_mask=mask, use_cache=True).past_key_values

    def attention_mask(self, lm: Any, mask: Tensor) -> Tensor:
        """Expand a mask for the layers' attention, without reading its values (which would synchronise a GPU).

        Args:
            lm: Language model.
            mask: Bool, true on positions to attend to: ``(B, S)``, or ``(L, S)`` with a leading axis of 1.

        Returns:
            ``(B, 1, 1, S)`` or ``(1, 1, L, S)`` in the form that the layers expect.
        """
        raise NotImplementedError

    def decode(self, lm: Any, states: Any, mask: Tensor, decoder_inputs: Tensor, prefix: Any = None) -> Tensor:
        """Run the decoder under teacher forcing.

        Args:
            lm: Language model.
            states: ``(B, S, d)`` encoder states.
            mask: ``(B, S)`` bool, true on real encoder positions.
            decoder_inputs: ``(B, L)`` token ids.
            prefix: Cache from :meth:`decoder_prefix`, or None.

        Returns:
            ``(B, L, d)`` states, from which :meth:`vocabulary_projection` computes the logits.
        """
        return self.run_decoder(lm, self.stack(lm, "decoder"), states, mask, {"input_ids": decoder_inputs}, prefix)

    def run_decoder(
        self, lm: Any, decoder: Any, states: Tensor, mask: Tensor, inputs: Mapping[str, Tensor], prefix: Any = None
    ) -> Tensor:
        """Run a decoder under teacher forcing; the other arguments are those of :meth:`decode`.

        Args:
            lm: Language model.
            decoder: Its decoder, or one built by :meth:`narrow_stack`.
            states: ``(B, S, width of the decoder)`` encoder states.
            mask: ``(B, S)`` bool.
            inputs: ``input_ids`` ``(B, L)``, or ``inputs_embeds`` ``(B, L, d)``.
            prefix: Cache, or None.
        """
        length = next(iter(inputs.values())).shape[1]
        before = 0 if prefix is None else prefix.get_seq_length()
        return decoder(
            **inputs,
            attention_mask=self.attention_mask(lm, causal_mask(length, before, device=states.device)),
            encoder_hidden_states=states,
            encoder_attention_mask=self.attention_mask(lm, mask),
            past_key_values=prefix,
            use_cache=prefix is not None,
        ).last_hidden_state

    def step(self, lm: Any, states: Any, mask: Tensor, prefix: Any, logits: Callable[[Tensor], Tensor]) -> Step:
        """Return decoder steps with a cache, for :func:`vlpet_lightning.beam_search.beam_search`.

        Args:
            lm: Language model.
            states: ``(B, S, d)`` encoder states.
            mask: ``(B, S)`` bool, true on real positions.
            prefix: Cache with ``B`` rows that precede the decoder's tokens, or None.
            logits: Computes logits ``(R, vocabulary)`` from decoder states ``(R, d)``.
        """
        return self.cached_decoder(lm, self.stack(lm, "decoder"), states, mask, token_inputs, logits, prefix)

    def generating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which decoder steps of a model run."""
        return beam_attention_in(model)

    def cached_decoder(
        self,
        lm: Any,
        decoder: Any,
        states: Tensor,
        mask: Tensor,
        inputs: Callable[[Tensor], Mapping[str, Tensor]],
        output: Callable[[Tensor], Tensor],
        prefix: Any = None,
    ) -> CachedDecoder:
        """Return steps of a decoder, or of one built by :meth:`narrow_stack`; see :class:`CachedDecoder`."""
        attention_mask = partial(self.attention_mask, lm)
        return CachedDecoder(decoder, attention_mask, states, mask, inputs, output, prefix)

    def operations(self, lm: Any, tokens: Tokens = "source") -> Operations:
        """Yield the operations of encoder and decoder.

        Args:
            lm: Language model.
            tokens: Kind of tokens that its encoder reads; ``text`` without prompts and image tokens.
        """
        inputs = ("words",) if tokens == "text" else ("words", "images", "prompt")
        yield from self.stack_operations(self.stack(lm, "encoder"), "encoder", tokens, inputs)
        memory = Activations("encoder", tokens)
        yield from self.stack_operations(self.stack(lm, "decoder"), "decoder", "target", ("words",), memory)

    def stack_operations(
        self, stack: Any, name: str, tokens: Tokens, inputs: tuple[str, ...] = (), memory: Activations | None = None
    ) -> Operations:
        """Yield the operations of an encoder or decoder, or of one built by :meth:`narrow_stack`.

        Args:
            stack: The stack.
            name: Name of its activations.
            tokens: Kind of tokens that it reads.
            inputs: Names of the activations that its input is computed from.
            memory: Encoder states that its cross-attention reads; None for an encoder.
        """
        sites: dict[str, Any] = self.sites
        projections = [f".{sites[f'decoder.cross.{kind}'].leaves}." for kind in ("key", "value")]
        for path, part in stack.named_modules():
            if memory is not None and any(projection in f".{path}." for projection in projections):
                yield Applied(part, memory.tokens, (memory.name, name), name)
            else:
                yield Applied(part, tokens, (*inputs, name), name)
        layers: Any = self.stack_layers(stack)
        width = layers[0].get_submodule(sites["encoder.attn.query"].leaves).out_features
        for keys in (tokens,) if memory is None else (tokens, memory.tokens):
            yield Attention(width, len(layers), tokens, keys, name)

    def vocabulary_projection(self, lm: Any) -> VocabularyProjection:
        """Return how logits are computed from decoder states."""
        return VocabularyProjection(lm.lm_head)

    def decoder_inputs(self, lm: Any, labels: Tensor) -> Tensor:
        """Shift targets right and prepend the start token; ``(B, L)``."""
        raise NotImplementedError

    def answer_prefix(self, config: Any) -> list[int]:
        """Return the decoder tokens that precede the first token of an answer."""
        raise NotImplementedError

    def generation(self, config: Any, num_beams: int, max_length: int) -> GenerationConfig:
        """Return the original's decoding settings for this backbone."""
        raise NotImplementedError

    def norms(self, lm: Any, stack: str) -> dict[str, nn.Module]:
        """Return the norms of a stack by their names in the language model, excluding those of units."""
        root = self.stack_path(stack)
        return {
            f"{root}.{name}": module
            for name, module in self.stack(lm, stack).named_modules()
            if type(module).__name__.endswith(self.norm_class) and ".unit." not in name and ".input_unit." not in name
        }


def narrow_config(config: Any, reduction: int, widths: Sequence[str]) -> Any:
    """Copy a configuration, with some of its widths divided.

    Raises:
        ValueError: If a width is not a multiple of the divisor.
    """
    config = copy.deepcopy(config)
    for name in widths:
        width = getattr(config, name)
        if width % reduction:
            raise ValueError(f"a reduction of {reduction} does not divide the backbone's {name} of {width}")
        setattr(config, name, width // reduction)
    return config


def plain_search(num_beams: int, max_length: int, start: int, end: int, pad: int) -> GenerationConfig:
    """Return settings of a greedy or beam search without further rules.

    Args:
        num_beams: Number of beams.
        max_length: Maximum number of tokens, including the start token.
        start: Token that the decoder starts from.
        end: Token that ends an answer.
        pad: Padding token.
    """
    return GenerationConfig(
        num_beams=num_beams,
        max_length=max_length,
        do_sample=False,
        early_stopping=False,
        length_penalty=1.0,
        decoder_start_token_id=start,
        eos_token_id=end,
        pad_token_id=pad,
    )
