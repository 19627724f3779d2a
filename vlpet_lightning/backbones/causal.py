"""Base class of decoder-only vision-and-language models: image tokens among text in one causal sequence.

The sequence of a sample is ``[template, image tokens, text, template, answer]``, after a learned prompt if there is
one. Text is padded on the right, inside the sequence: padding is masked, and positions are counted over real tokens
only, so that the result is that of the sequence without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from vlpet_lightning.backbones.base import plain_search
from vlpet_lightning.backbones.causal_steps import CausalSteps, PrefixStates
from vlpet_lightning.backbones.sequence import SequenceBackbone
from vlpet_lightning.pet.inject import UnitLinear
from vlpet_lightning.pet.operations import Applied, Attention, Operations, Tokens
from vlpet_lightning.pet.placement import AnySite, PromptSite, Site

InLayer = partial(Site, "decoder", positions=True)
LAYER: dict[str, AnySite] = {  # module names inside a layer of the language model, the same in Llama, Gemma and Qwen
    "decoder.attn": InLayer("self_attn.q_proj", "self_attn.o_proj"),
    **{
        f"decoder.attn.{part}": InLayer(f"self_attn.{part[0]}_proj", f"self_attn.{part[0]}_proj")
        for part in ("query", "key", "value")
    },
    "decoder.ffn": InLayer("mlp.gate_proj", "mlp.down_proj"),
    "decoder.ffn.inner": InLayer("mlp.down_proj", "mlp.down_proj", side="input"),
    "decoder.prompt": PromptSite("decoder"),
}
NO_STACK_BESIDE = (
    "a side network has layers beside those of an encoder and a decoder, and this model has one stack; use units "
    "inside its layers, such as decoder.attn"
)
Ends = tuple[str, str]  # names of the layer where x enters, and of the linear layer that h leaves


def sites_of(
    projector: Ends,
    attn: Ends = ("self_attn.q_proj", "self_attn.out_proj"),
    ffn: Ends = ("mlp.fc1", "mlp.fc2"),
    flat: bool = False,
) -> dict[str, AnySite]:
    """Return the table of sites of a family.

    Args:
        projector: Its first and last linear layer, named relative to the projector.
        attn: First and last linear layer of the attention, named relative to a layer of the tower; by default those of
            SigLIP and CLIP.
        ffn: The same for the feed-forward.
        flat: Whether tower and projector compute the vectors of all images as one sequence.
    """
    vision = {"attn": attn, "ffn": ffn}
    return (
        LAYER
        | {f"vision.{name}": Site("vision", *ends, flat=flat) for name, ends in vision.items()}
        | {"projector": Site("projector", *projector, flat=flat)}
    )


class CausalBackbone(SequenceBackbone):
    """A decoder-only model.

    Attributes:
        text_path: Name of the decoder in the model.
    """

    added_vocabulary = 0
    norm_places: ClassVar[dict[str, str]] = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}
    norm_class = "RMSNorm"
    has_encoder = False
    prompt_stack = "decoder"
    required = ()
    dropouts: ClassVar[tuple[str, ...]] = ()
    text_path: ClassVar[str]

    @property
    def refused_sites(self) -> dict[str, str]:
        return {"side": NO_STACK_BESIDE} | self.refused_in_tower()

    def sizes(self, config: Any) -> dict[str, Any]:
        text, tower = self.text_config(config), config.vision_config
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        found = {name: getattr(text, name) for name in names}
        return found | {f"vision.{name}": getattr(tower, name, None) for name in ("hidden_size", "num_hidden_layers")}

    def configured(self, config: Any, vocabulary: int, dropout: float) -> Any:
        return config

    def layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        return {"decoder": list(self.stack(lm, "decoder").layers)}

    def site_layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        vision = self.tower_layers(lm) if self.reads_pixels else []
        return {**self.layers(lm), "vision": vision, "projector": [self.projector(lm)]}

    def stack_path(self, name: str) -> str:
        return self.text_path

    def text_config(self, config: Any) -> Any:
        return config.get_text_config()

    def norms(self, lm: Any, stack: str) -> dict[str, nn.Module]:
        return super().norms(lm, stack) if stack == "decoder" else {}

    def encode(self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: Any = None) -> PrefixStates:
        """Embed the sequences before the answer; the decoder runs in :meth:`decode` or :meth:`step`."""
        embed = self.stack(lm, "decoder").embed_tokens
        text = embed(input_ids)
        parts = self.template_parts(lm)

        def fixed(ids: tuple[int, ...]) -> Tensor:
            return embed(parts[ids]).expand(len(text), -1, -1)

        split = visual.to(text.dtype).split(self.image_tokens(lm.config), dim=1)
        embedded, length = self._sequence(fixed, split, text), 0
        if prompt is not None:
            embedded, length = prompt(embedded, embedded), prompt.length
        return PrefixStates(embedded, mask, *self.positions(lm, mask, len(split), length))

    def decode(self, lm: Any, states: Any, mask: Tensor, decoder_inputs: Tensor, prefix: Any = None) -> Tensor:
        """Run the decoder over prompt and answer; returns the states of the answer's positions."""
        answer = self.stack(lm, "decoder").embed_tokens(decoder_inputs)
        embedded = torch.cat([states.embedded, answer.to(states.embedded.dtype)], dim=1)
        mask = torch.cat([states.mask, states.mask.new_ones(answer.shape[:2])], dim=1)
        positions = states.positions_with(answer.shape[1])
        return self._run(lm, states.embedded.shape[1] + 1, embedded, mask, positions)[:, -answer.shape[1] :]

    def _run(
        self, lm: Any, prompt: int, embedded: Tensor, mask: Tensor, positions: Tensor, cache: Any = None
    ) -> Tensor:
        """Run the decoder over ``(B, L, d)`` inputs, the last of the ``(B, S)`` positions of the mask."""
        found = self.stack(lm, "decoder")(
            inputs_embeds=embedded,
            attention_mask=self.attention_masks(lm, mask, embedded.shape[1], prompt),
            position_ids=positions if positions.dim() == 2 else positions.transpose(0, 1),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return found.last_hidden_state

    def step(self, lm: Any, states: Any, mask: Tensor, prefix: Any, logits: Callable[[Tensor], Tensor]) -> CausalSteps:
        embed = self.stack(lm, "decoder").embed_tokens
        return CausalSteps(embed, partial(self._run, lm, states.embedded.shape[1] + 1), states, logits)

    def generating(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def operations(self, lm: Any, tokens: Tokens = "source") -> Operations:
        decoder = self.stack(lm, "decoder")
        hosts = [host for host in decoder.modules() if isinstance(host, UnitLinear)]
        limits = {id(part): unit.positions for host in hosts for unit in host.units for part in unit.modules()}
        for part in decoder.modules():
            positions = limits.get(id(part), "all")
            yield Applied(
                part, "images" if positions == "image" else tokens, ("words", "images", "prompt", "decoder"), "decoder"
            )
            if positions == "all":
                yield Applied(part, "target", ("words", "decoder"), "decoder")
        query: Any = self.layers(lm)["decoder"][0].get_submodule("self_attn.q_proj")
        kinds: tuple[Tokens, Tokens] = (tokens, "target")
        for queries, keys in product(kinds, kinds):  # also those that the mask forbids
            yield Attention(query.out_features, len(decoder.layers), queries, keys, "decoder")

    def decoder_inputs(self, lm: Any, labels: Tensor) -> Tensor:
        start = labels.new_full((len(labels), 1), self._template().start)
        return torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)

    def answer_prefix(self, config: Any) -> list[int]:
        return [self._template().start]

    def generation(self, config: Any, num_beams: int, max_length: int) -> GenerationConfig:
        """Return settings for plain greedy or beam search."""
        template = self._template()
        return plain_search(num_beams, max_length, template.start, template.end, template.pad)
