"""Base class of decoder-only vision-and-language models: image tokens among text in one causal sequence.

The sequence of a sample is ``[template, image tokens, text, template, answer]``, after a learned prompt if there is
one. Text is padded on the right, inside the sequence: padding is masked, and positions are counted over real tokens
only, so that the result is that of the sequence without padding.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import GenerationConfig

from vlpet_lightning.backbones.base import Backbone, plain_search
from vlpet_lightning.backbones.causal_steps import CausalSteps, PrefixStates
from vlpet_lightning.backbones.image_processor import load_image_processor
from vlpet_lightning.backbones.masks import additive, causal_mask
from vlpet_lightning.backbones.projected_features import ProjectedFeatures
from vlpet_lightning.backbones.template import TOKENS, Template, chat_prompt, read_template
from vlpet_lightning.backbones.tokenizer import load_tokenizer
from vlpet_lightning.backbones.unloaded_tower import (
    NOT_LOADED,
    is_whole,
    load_without_tower,
    parts_outside,
    safetensors_files,
    weights_or_rows,
)
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
IMAGE_SETTINGS = {  # their form, and the reason why a family has none
    "image_size": ("[height, width]", "a {} model has its own"),
    "tiling": ("[rows, columns]", "images of a {} model are not divided"),
}
LAYOUT = ("prompt", "template", "image", "text")  # kinds of positions before the answer
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
        loads_tower: Whether :meth:`load` reads the weights of the vision tower; see :meth:`without_tower`.
        text_template: Default template of a prompt, see :func:`vlpet_lightning.backbones.template.read_template`.
        image_template: Default template around the tokens of an image that is one view.
        image_mark: Image in a chat template of the library.
        text_path: Name of the decoder in the model.
        projector_path: Name of the projector.
        tower_path: Name of the vision tower.
        image_settings: Names of the settings that determine the feature vectors of an image, beside the model's
            configuration; each is an attribute too, ``(height, width)`` or ``(rows, columns)``, or None.
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
    loads_tower = True
    _settings: dict[str, Any] | None = None
    text_template: ClassVar[str]
    image_template: ClassVar[str]
    image_mark: ClassVar[str] = "<image>"
    text_path: ClassVar[str]
    projector_path: ClassVar[str]
    tower_path: ClassVar[str]
    image_settings: ClassVar[tuple[str, ...]] = ()
    prompt_both_ways: ClassVar[bool] = False

    def with_template(self, template: Template, settings: Mapping[str, Any] | None = None) -> CausalBackbone:
        """Return this description with a prompt template, and the text that it was read from."""
        found = copy.copy(self)
        found.template = template
        found._settings = None if settings is None else dict(settings)
        return found

    def with_settings(self, name_or_path: str, settings: Mapping[str, Any] | None) -> Backbone:
        """Return this description with the prompt template ``text`` and the template of an ``image``.

        Without ``text``, the prompt is the chat template of the tokenizer, or that of the family if there is none.

        Raises:
            ValueError: If a template lacks a placeholder, or has a special token that the tokenizer does not have.
        """
        found = self.with_sizes(settings or {})
        default, tokenizer = found.default_image_template(), load_tokenizer(name_or_path)
        given = dict(settings or {})
        if "text" not in given:
            given["text"] = chat_prompt(tokenizer, self.image_mark, name_or_path) or self.text_template
        given = {"image": default} | given
        template = read_template(tokenizer, given["text"], given["image"], default.count(TOKENS))
        return found.with_template(template, given)

    def save_processor(self, name_or_path: str, folder: Path) -> None:
        try:
            load_image_processor(name_or_path).save_pretrained(folder)
        except FileNotFoundError as error:
            warnings.warn(f"`ask` will not work with {folder}: {error}", stacklevel=2)

    def with_sizes(self, settings: Mapping[str, Any]) -> CausalBackbone:
        """Return this description with the sizes among its settings, which do not need a tokenizer.

        Raises:
            ValueError: If a size does not apply to the family, or is not a pair of positive numbers.
        """
        found = copy.copy(self)
        for name, (form, reason) in IMAGE_SETTINGS.items():
            value = settings.get(name)
            if value is None:
                continue
            if name not in self.image_settings:
                raise ValueError(f"{name} is {value}: {reason.format(self.kind)}, omit it")
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"{name} must be {form}, got {list(value)}")
            setattr(found, name, tuple(value))
        return found

    def default_image_template(self) -> str:
        """Return the default template around the tokens of an image, with a placeholder for each view."""
        return self.image_template

    def recorded_settings(self) -> dict[str, list[int] | None]:
        """Return the values of :attr:`image_settings`, as in the record of a feature store."""
        values = {name: getattr(self, name) for name in self.image_settings}
        return {name: None if value is None else list(value) for name, value in values.items()}

    def without_tower(self) -> CausalBackbone:
        """Return this description for models that are loaded without their vision tower, to read stored features."""
        found = copy.copy(self)
        found.loads_tower = False
        return found

    def settings(self) -> dict[str, Any] | None:
        return self._settings

    def from_pretrained(self, name_or_path: str, **settings: Any) -> Any:
        files = {} if self.loads_tower else safetensors_files(name_or_path)
        parts = self.tower_path, self.projector_path
        found = load_without_tower(self.model_class, *parts, files, name_or_path, **settings) if files else None
        if found is not None:
            return found
        found = super().from_pretrained(name_or_path, **settings)
        if not self.loads_tower:
            warnings.warn(
                f"the vision tower of {name_or_path!r} is loaded, too: its weights are not in safetensors files under "
                f"the names of the model; save it with save_pretrained to need less memory",
                stacklevel=2,
            )
        return found

    def check_whole(self, lm: Any) -> None:
        if not is_whole(lm):
            raise ValueError(NOT_LOADED)

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

    def patch_tokens(self, config: Any) -> Tensor:
        """Return which of an image's tokens stand for a part of it, ``(P,)`` bool."""
        return torch.ones(self.image_tokens(config), dtype=torch.bool)

    def whole_view(self, config: Any) -> slice:
        """Return the tokens of the view of the whole image, among those of an image; they are in row-major order."""
        return slice(0, int(self.patch_tokens(config).sum()))

    def vectors(self, config: Any) -> int:
        """Return the number of vectors that the tower computes for an image."""
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def visual_embedding(self, lm: Any, feature_dim: int, grid: int | None, projector: Any = None) -> nn.Module:
        return ProjectedFeatures(
            self.projector_function(lm),
            per_image=self.image_tokens(lm.config),
            feature_dim=self.feature_dim(lm.config),
            vectors=self.vectors(lm.config),
        )

    def template_tokens(self, images: int) -> int | None:
        return None if self.template is None else self.template.length(images)

    def tower_parts(self, lm: Any) -> Sequence[nn.Module]:
        return [lm.get_submodule(name) for name in parts_outside(lm, self.tower_path, self.projector_path)]

    def tower_attention(self, config: Any) -> int:
        tower = config.vision_config
        return tower.hidden_size * tower.num_hidden_layers * self.vectors(config) ** 2

    def check_trained(self, rules: Mapping[str, Collection[str]]) -> None:
        tower, projector = f"lm.{self.tower_path}.", f"lm.{self.projector_path}."
        for rule, names in rules.items():
            inside = [name for name in names if name.startswith(tower) and not name.startswith(projector)]
            if inside:
                raise ValueError(
                    f"trainable rule {rule!r} selects {len(inside)} tensors of the vision tower, which stored features "
                    "give no gradient: remove the rule"
                )

    @property
    def processing(self) -> dict[str, Any]:
        """Settings of the library's image processor that replace its own."""
        return {}

    def pixels(self, config: Any, processor: Any, image: Image) -> Tensor:
        """Return the input of :meth:`tower_output` for an image, without the batch axis.

        Args:
            config: Configuration of the model.
            processor: The library's image processor.
            image: Image in RGB.

        Returns:
            ``(3, H, W)`` float32, or ``(views, 3, H, W)`` of an image that is divided.

        Raises:
            ValueError: If the image processor makes views of another size than the tower reads.
        """
        found = self.process(config, processor, image)
        side = config.vision_config.image_size
        if found.shape[-2:] != (side, side):
            height, width = found.shape[-2:]
            raise ValueError(
                f"the image processor makes {height} x {width} pixels of an image, the tower reads {side} x {side}: "
                "set the size in preprocessor_config.json to image_size in config.json"
            )
        return found.float()

    def process(self, config: Any, processor: Any, image: Image) -> Tensor:
        """Return what the library's image processor makes of an image, by default its only view."""
        found = processor(images=[image], return_tensors="pt", **self.processing)["pixel_values"]
        return found.flatten(0, -4)[0]

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        """Return the ``(B, F, D)`` features of images, which the projector reads.

        Args:
            lm: The model.
            pixels: ``(B, ...)``, made by :meth:`pixels`.
        """
        raise NotImplementedError

    def tower_fingerprint(self, lm: Any) -> str:
        """Return a digest of the tower's weights, without those of a projector inside the tower.

        The first rows of its matrices are enough.
        """
        projector = {id(parameter) for parameter in self.projector(lm).parameters()}
        named = weights_or_rows(lm.get_submodule(self.tower_path))
        return weights_digest({name: tensor for name, tensor in named.items() if id(tensor) not in projector})

    def image_slices(self, config: Any, images: int, prompt: int) -> list[slice]:
        """Return the positions of the tokens of each image's views in the sequence.

        Args:
            config: The model's configuration.
            images: Number of images per sample.
            prompt: Number of learned prompt tokens.
        """
        template, place = self._template(), prompt + len(self._template().before)
        tokens = self.image_tokens(config) // (len(template.between_views) + 1)
        found = []
        for _ in range(images):
            place += len(template.image_before)
            for after in (*template.between_views, template.image_after):
                found.append(slice(place, place + tokens))
                place += tokens + len(after)
        return found

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
            parts.append(fixed(template.image_before))
            first, *others = image.chunk(len(template.between_views) + 1, dim=1)
            parts.append(first)
            for ids, view in zip(template.between_views, others, strict=True):
                parts += [fixed(ids), view]
            parts.append(fixed(template.image_after))
        return torch.cat([*parts, fixed(template.between), text, fixed(template.after[:-1])], dim=1)

    def layout(self, config: Any, images: int, text: int, prompt: int) -> Tensor:
        """Return the kinds of the positions before the decoder's inputs, as ``(S,)`` indices into :data:`LAYOUT`.

        Args:
            config: The model's configuration.
            images: Number of images per sample.
            text: Number of text tokens, including padding.
            prompt: Number of learned prompt tokens.
        """
        learned, template, image, words = map(LAYOUT.index, ("prompt", "template", "image", "text"))
        of_image = torch.where(self.patch_tokens(config), image, template)[None]
        of_text = of_image.new_full((1, text), words)
        found = self._sequence(lambda ids: of_text.new_full((1, len(ids)), template), [of_image] * images, of_text)[0]
        return torch.cat([found.new_full((prompt,), learned), found])

    def whole_images(self, config: Any, images: int, prompt: int) -> Tensor:
        """Return the positions of the view of each whole image in the sequence, one image after the other."""
        slices = self.image_slices(config, images, prompt)
        tokens = torch.cat([torch.arange(one.start, one.stop) for one in slices]).unflatten(0, (images, -1))
        return tokens[:, self.whole_view(config)].flatten()

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
