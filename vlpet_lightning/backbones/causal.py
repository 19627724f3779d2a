"""Base class of decoder-only vision-and-language models: image tokens among text in one causal sequence.

The sequence of a sample is ``[template, image tokens, text, template, answer]``, after a learned prompt if there is
one. Text is padded on the right, inside the sequence: padding is masked, and positions are counted over real tokens
only, so that the result is that of the sequence without padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from vlpet_lightning.backbones.base import Backbone, plain_search
from vlpet_lightning.backbones.causal_steps import CausalSteps, PrefixStates
from vlpet_lightning.backbones.masks import additive, causal_mask
from vlpet_lightning.backbones.projected_features import ProjectedFeatures
from vlpet_lightning.backbones.template import Template, read_template
from vlpet_lightning.backbones.tokenizer import load_tokenizer
from vlpet_lightning.checksums import weights_digest
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
IN_THE_TOWER = (
    "the vision tower does not run in training, which reads its stored outputs; adapt these at projector, or use sites "
    "of the decoder"
)
REFUSED: dict[str, str] = {
    "side": "a side network has layers beside those of an encoder and a decoder, and this model has one stack; use "
    "units inside its layers, such as decoder.attn",
    "vision.attn": IN_THE_TOWER,
    "vision.ffn": IN_THE_TOWER,
}
# of a model without a tokenizer, which is built to be counted
NO_TEMPLATE = Template((), (), (), (), (0,), end=0, pad=0)


def with_projector(enters: str, leaves: str) -> dict[str, AnySite]:
    """Return the table of sites of a family whose projector has some layers, named relative to the projector.

    Args:
        enters: Its first linear layer, whose input is ``x``.
        leaves: Its last linear layer, whose output is ``h``.
    """
    return LAYER | {"projector": Site("projector", enters, leaves)}


class CausalBackbone(Backbone):
    """A decoder-only model.

    Attributes:
        template: Prompt around images and text; None for a model that is only counted.
        text_template: Default template of a prompt, see :func:`vlpet_lightning.backbones.template.read_template`.
        image_template: Default template around the tokens of an image.
        text_path: Name of the decoder in the model.
        projector_path: Name of the projector.
        tower_path: Name of the vision tower.
        processing: Settings of the library's image processor with which an image is one view.
        extractable: Whether :meth:`tower_output` is implemented.
        prompt_both_ways: Whether the tokens of the prompt, including the decoder's first input, attend to those after
            them in the prompt.
    """

    added_vocabulary = 0
    norm_places: ClassVar[dict[str, str]] = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}
    norm_class = "RMSNorm"
    has_encoder = False
    prompt_stack = "decoder"
    required = ()
    dropouts: ClassVar[tuple[str, ...]] = ()
    refused_sites = REFUSED
    template: Template | None = None
    _settings: dict[str, Any] | None = None
    text_template: ClassVar[str]
    image_template: ClassVar[str]
    text_path: ClassVar[str]
    projector_path: ClassVar[str]
    tower_path: ClassVar[str]
    processing: ClassVar[dict[str, Any]] = {}
    extractable: ClassVar[bool] = False
    prompt_both_ways: ClassVar[bool] = False

    def with_template(self, template: Template, settings: Mapping[str, Any] | None = None) -> CausalBackbone:
        """Return this description with a prompt template, and the text that it was read from."""
        found = copy.copy(self)
        found.template = template
        found._settings = None if settings is None else dict(settings)
        return found

    def with_settings(self, name_or_path: str, settings: Mapping[str, Any] | None) -> Backbone:
        """Return this description with the prompt template ``text`` and the template of an ``image``.

        Raises:
            ValueError: If a template lacks a placeholder.
        """
        settings = {"text": self.text_template, "image": self.image_template} | dict(settings or {})
        template = read_template(load_tokenizer(name_or_path), settings["text"], settings["image"])
        return self.with_sizes(settings).with_template(template, settings)

    def with_sizes(self, settings: Mapping[str, Any]) -> CausalBackbone:
        """Return this description with the sizes among its settings, which do not need a tokenizer.

        Raises:
            ValueError: If a size does not apply to the family.
        """
        if settings.get("image_size") is not None:
            raise ValueError(f"image_size is {settings['image_size']}: a {self.kind} model has its own, omit it")
        return self

    def settings(self) -> dict[str, Any] | None:
        return self._settings

    def _template(self) -> Template:
        return NO_TEMPLATE if self.template is None else self.template

    def sizes(self, config: Any) -> dict[str, Any]:
        text, tower = self.text_config(config), config.vision_config
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        found = {name: getattr(text, name) for name in names}
        return found | {f"vision.{name}": getattr(tower, name, None) for name in ("hidden_size", "num_hidden_layers")}

    def configured(self, config: Any, vocabulary: int, dropout: float) -> Any:
        return config

    # parts ---------------------------------------------------------------------------------------------------------

    def layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        return {"decoder": list(self.stack(lm, "decoder").layers)}

    def site_layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        return {**self.layers(lm), "projector": [self.projector(lm)]}

    def stack_path(self, name: str) -> str:
        return self.text_path

    def text_config(self, config: Any) -> Any:
        return config.get_text_config()

    def projector(self, lm: Any) -> nn.Module:
        """Return the module between vision tower and language model."""
        return lm.get_submodule(self.projector_path)

    def projector_function(self, lm: Any) -> Callable[[Tensor], Tensor]:
        """Return what maps ``(n, F, D)`` features of images to their tokens, by default the projector."""
        return self.projector(lm)

    def visual_parameters(self, lm: Any, visual: nn.Module) -> dict[str, nn.Parameter]:
        named = self.projector(lm).named_parameters()
        return {f"lm.{self.projector_path}.{name}": parameter for name, parameter in named}

    def visual_operations(self, lm: Any, visual: nn.Module) -> Operations:
        for part in self.projector(lm).modules():  # features need no gradient, the inputs of later layers do
            yield Applied(part, "images", ("projected",), "projected")

    def norms(self, lm: Any, stack: str) -> dict[str, nn.Module]:
        return super().norms(lm, stack) if stack == "decoder" else {}

    def feature_dim(self, config: Any) -> int:
        """Return the dimension ``D`` of the feature vectors that the projector reads."""
        return config.vision_config.hidden_size

    def image_tokens(self, config: Any) -> int:
        """Return the number of tokens of an image."""
        raise NotImplementedError

    def vectors(self, config: Any) -> int:
        """Return the number of vectors that the tower computes for an image."""
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def visual_embedding(self, lm: Any, feature_dim: int, grid: int | None, projector: Any = None) -> nn.Module:
        return ProjectedFeatures(
            self.projector_function(lm),
            per_image=self.image_tokens(lm.config),
            feature_dim=lm.config.vision_config.hidden_size,
            vectors=self.vectors(lm.config),
        )

    def check_trained(self, rules: Mapping[str, Collection[str]]) -> None:
        tower, projector = f"lm.{self.tower_path}.", f"lm.{self.projector_path}."
        for rule, names in rules.items():
            inside = [name for name in names if name.startswith(tower) and not name.startswith(projector)]
            if inside:
                raise ValueError(
                    f"trainable rule {rule!r} selects {len(inside)} tensors of the vision tower, which stored features "
                    "give no gradient: remove the rule"
                )

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        """Return the ``(B, F, D)`` features of images, which the projector reads.

        Args:
            lm: The model.
            pixels: ``(B, 3, H, W)``, one view of each image.

        Available if :attr:`extractable`.
        """
        raise NotImplementedError(self.kind)

    def tower_fingerprint(self, lm: Any) -> str:
        """Return a digest of the tower's weights, without those of a projector inside the tower."""
        projector = set(self.projector(lm).parameters())
        named = lm.get_submodule(self.tower_path).named_parameters()
        return weights_digest({name: parameter for name, parameter in named if parameter not in projector})

    def image_slices(self, config: Any, images: int, prompt: int) -> list[slice]:
        """Return the positions of each image's tokens in the sequence.

        Args:
            config: The model's configuration.
            images: Number of images per sample.
            prompt: Number of learned prompt tokens.
        """
        template, tokens = self._template(), self.image_tokens(config)
        first = prompt + len(template.before) + len(template.image_before)
        around = len(template.image_before) + tokens + len(template.image_after)
        return [slice(first + image * around, first + image * around + tokens) for image in range(images)]

    def unit_positions(self, lm: Any, mask: Tensor, images: int, prompt: int) -> dict[str, Tensor]:
        """Return the indices of ``prefix`` and ``image`` positions.

        The prefix includes the decoder's first input, which is the template's last token.
        """
        slices = self.image_slices(lm.config, images // self.image_tokens(lm.config), prompt)
        tokens = [torch.arange(one.start, one.stop, device=mask.device) for one in slices]
        return {"prefix": torch.arange(mask.shape[1] + 1, device=mask.device), "image": torch.cat(tokens)}

    def positions(self, lm: Any, mask: Tensor, images: int, prompt: int) -> tuple[Tensor, Tensor]:
        """Return ``positions`` and ``answer`` of :class:`PrefixStates`.

        Args:
            lm: The model.
            mask: ``(B, S)`` bool, true on real positions.
            images: Number of images per sample.
            prompt: Number of learned prompt tokens, which count as positions.
        """
        return mask.cumsum(dim=1) - mask.long(), mask.sum(dim=1)

    def attention_masks(self, lm: Any, mask: Tensor, length: int, prompt: int) -> Tensor | dict[str, Tensor]:
        """Return the mask of the decoder's attention, in the form that the library's decoder expects.

        Args:
            lm: The model.
            mask: ``(B, S)`` bool, true on real positions.
            length: Number of query positions ``L``, the last ones of the sequence.
            prompt: Number of positions before the answer, including the decoder's first input.

        Returns:
            ``(B, 1, L, S)`` mask of all layers, or the masks of layers with and without a sliding window.
        """
        before = mask.shape[1] - length
        causal = causal_mask(length, before, device=mask.device)
        in_prompt = torch.arange(mask.shape[1], device=mask.device) < (prompt if self.prompt_both_ways else 0)
        both_ways = in_prompt[before:, None] & in_prompt
        full = self.attention_mask(lm, (causal | both_ways) & mask[:, None])
        window = getattr(self.text_config(lm.config), "sliding_window", None)
        if window is None:
            return full
        order = mask.cumsum(dim=1)  # distances are counted over real tokens
        near = order[:, before:, None] - order[:, None] < window
        sliding = self.attention_mask(lm, (causal & near | both_ways) & mask[:, None])
        return {"full_attention": full, "sliding_attention": sliding}

    def attention_mask(self, lm: Any, mask: Tensor) -> Tensor:
        """Expand a ``(B, L, S)`` bool mask to ``(B, 1, L, S)`` in the form that the layers expect."""
        mask = mask[:, None]
        config = self.text_config(lm.config)
        return mask if config._attn_implementation == "sdpa" else additive(mask, self.token_embedding(lm).dtype)

    # computing -----------------------------------------------------------------------------------------------------

    def _sequence(self, fixed: Callable[[tuple[int, ...]], Tensor], images: Sequence[Tensor], text: Tensor) -> Tensor:
        """Concatenate the parts of the sequences before the answer, along axis 1.

        Args:
            fixed: Returns the part of some token ids, for all samples.
            images: The part of each image.
            text: The part of the text.
        """
        template = self._template()
        parts = [fixed(template.before)]
        for image in images:
            parts += [fixed(template.image_before), image, fixed(template.image_after)]
        return torch.cat([*parts, fixed(template.between), text, fixed(template.after[:-1])], dim=1)

    def mask(self, lm: Any, input_ids: Tensor, text: Tensor, images: Tensor, prompt: int) -> Tensor:
        """Return the mask in the order of the sequence; the end token of the text is masked like padding."""
        text = text & (input_ids != self._template().end)
        split = images.split(self.image_tokens(lm.config), dim=1)
        mask = self._sequence(lambda ids: text.new_ones(len(text), len(ids)), split, text)
        return torch.cat([text.new_ones(len(text), prompt), mask], dim=1)

    def encode(self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: Any = None) -> PrefixStates:
        """Embed the sequences before the answer; the decoder runs in :meth:`decode` or :meth:`step`."""
        embed = self.stack(lm, "decoder").embed_tokens
        text = embed(input_ids)

        def fixed(ids: tuple[int, ...]) -> Tensor:
            return embed(input_ids.new_tensor(ids, dtype=torch.long)).expand(len(text), -1, -1)

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
