"""The sequence of a decoder-only model: prompt template, image tokens and text, their positions and masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from vlpet_lightning.backbones.masks import additive, causal_mask
from vlpet_lightning.backbones.template import TOKENS, Template, chat_prompt, read_template
from vlpet_lightning.backbones.tokenizer import load_tokenizer
from vlpet_lightning.backbones.vision import VisionBackbone

TEMPLATE_IDS = "template_ids"  # buffer of the language model
LAYOUT = ("prompt", "template", "image", "text")  # kinds of positions before the answer
# of a model without a tokenizer, which is built to be counted
NO_TEMPLATE = Template((), (), (), (), (0,), end=0, pad=0)

Described = TypeVar("Described", bound="SequenceBackbone")


class SequenceBackbone(VisionBackbone):
    """Sequence of a decoder-only model.

    Attributes:
        template: Prompt around images and text; None for a model that is only counted.
        text_template: Default template of a prompt, see :func:`vlpet_lightning.backbones.template.read_template`.
        image_template: Default template around the tokens of an image that is one view.
        image_mark: Image in a chat template of the library.
        prompt_both_ways: Whether the tokens of the prompt, including the decoder's first input, attend to those after
            them in the prompt.
    """

    template: Template | None = None
    _settings: dict[str, Any] | None = None
    text_template: ClassVar[str]
    image_template: ClassVar[str]
    image_mark: ClassVar[str] = "<image>"
    prompt_both_ways: ClassVar[bool] = False

    def with_template(self: Described, template: Template, settings: Mapping[str, Any] | None = None) -> Described:
        """Return this description with a prompt template, and the text that it was read from."""
        found = copy.copy(self)
        found.template = template
        found._settings = None if settings is None else dict(settings)
        return found

    def with_settings(self: Described, name_or_path: str, settings: Mapping[str, Any] | None) -> Described:
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

    def settings(self) -> dict[str, Any] | None:
        return self._settings

    def default_image_template(self) -> str:
        """Return the default template around the tokens of an image, with a placeholder for each view."""
        return self.image_template

    def _template(self) -> Template:
        return NO_TEMPLATE if self.template is None else self.template

    def prepare(self, lm: Any) -> None:
        """Keep the template's token ids beside the weights: a step that copied them to a GPU could not be recorded."""
        ids = [token for part in self._template().parts for token in part]
        device = self.token_embedding(lm).device
        lm.register_buffer(TEMPLATE_IDS, torch.tensor(ids, dtype=torch.long, device=device), persistent=False)

    def template_parts(self, lm: Any) -> dict[tuple[int, ...], Tensor]:
        """Return the ids of each part of the template on the model's device."""
        parts = self._template().parts
        return dict(zip(parts, getattr(lm, TEMPLATE_IDS).split([len(part) for part in parts]), strict=True))

    def template_tokens(self, images: int) -> int | None:
        return None if self.template is None else self.template.length(images)

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
