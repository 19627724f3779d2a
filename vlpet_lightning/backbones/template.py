"""Prompt template of a decoder-only model, as token ids around image tokens and text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

IMAGES, TEXT, TOKENS = "{images}", "{text}", "{tokens}"  # placeholders of the templates
SPECIAL = re.compile(r"<[^<>\s]+>")  # special tokens in a template


@dataclass(frozen=True)
class Template:
    """Token ids of a prompt ``before, images, between, text, after``, to which the answer is appended.

    Args:
        before: Ids before the first image.
        image_before: Ids before the tokens of each image.
        image_after: Ids after the tokens of each image.
        between: Ids between the last image and the text.
        after: Ids after the text; the last one is the first input of the decoder in generation.
        end: Token that ends an answer.
        pad: Padding token.
        between_views: Ids between the tokens of consecutive views of an image.
    """

    before: tuple[int, ...]
    image_before: tuple[int, ...]
    image_after: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    end: int
    pad: int
    between_views: tuple[tuple[int, ...], ...] = ()

    @property
    def start(self) -> int:
        """First input of the decoder."""
        return self.after[-1]

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """Ids around images and text, without the first input of the decoder."""
        return [
            *(self.before, self.image_before, *self.between_views, self.image_after),
            *(self.between, self.after[:-1]),
        ]

    def length(self, images: int) -> int:
        """Return the number of the prompt's own tokens beside those of its images and text.

        Args:
            images: Number of images.
        """
        around = sum(map(len, (self.image_before, *self.between_views, self.image_after)))
        return len(self.before) + images * around + len(self.between) + len(self.after) - 1


def chat_prompt(tokenizer: Any, mark: str, name: str) -> str | None:
    """Return the prompt of one question about an image by a tokenizer's chat template.

    Args:
        tokenizer: The model's tokenizer.
        mark: The image in its prompts.
        name: Name of the model, for messages.

    Returns:
        The prompt with ``{images}`` and ``{text}``; None if the tokenizer has no chat template.

    Raises:
        ValueError: If an image or the text is not in the prompt.
    """
    if not tokenizer.chat_template:
        return None
    parts = [{"type": "image"}, {"type": "text", "text": TEXT}]
    chat = [{"role": "user", "content": parts}]
    found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if found.count(mark) != 1 or found.count(TEXT) != 1:
        raise ValueError(
            f"the chat template of {name!r} makes {found!r}, in which {mark!r} and the text must be once: set "
            f"template, a prompt with {IMAGES} and {TEXT}"
        )
    return str(found.replace(mark, IMAGES))


def read_template(tokenizer: Any, text: str, image: str, views: int = 1) -> Template:
    """Convert templates of text to token ids.

    Args:
        tokenizer: The model's tokenizer, whose end token ends an answer.
        text: Prompt with the placeholders ``{images}`` and ``{text}``, in this order.
        image: Text around the tokens of one image, with the placeholder ``{tokens}`` for each view.
        views: Number of views of an image.

    Raises:
        ValueError: If a placeholder or a special token is missing, or nothing follows the text.
    """
    if [text.count(part) for part in (IMAGES, TEXT)] != [1, 1] or text.find(IMAGES) > text.find(TEXT):
        raise ValueError(f"template {text!r} must have {IMAGES} and {TEXT} once, in this order")
    if image.count(TOKENS) != views:
        raise ValueError(f"template {image!r} must have {TOKENS} {'once' if views == 1 else f'{views} times'}")
    before, rest = text.split(IMAGES)
    between, after = rest.split(TEXT)
    image_before, *between_views, image_after = image.split(TOKENS)

    def ids(part: str) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) if part else ()

    if not ids(after):
        raise ValueError(
            f"template {text!r} has nothing after {TEXT}: an answer needs a token to start from, e.g. a line break"
        )
    for mark in SPECIAL.findall(text + image):
        if tokenizer.convert_tokens_to_ids(mark) in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer has no token {mark!r}, which the prompt needs: set template and image_template to "
                f"those of the model{'' if views == 1 else ', or choose fewer tiles'}"
            )
    end = tokenizer.eos_token_id
    return Template(
        before=ids(before),
        image_before=ids(image_before),
        image_after=ids(image_after),
        between=ids(between),
        after=ids(after),
        end=end,
        pad=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        between_views=tuple(map(ids, between_views)),
    )
