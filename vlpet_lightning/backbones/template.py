"""Prompt template of a decoder-only model, as token ids around image tokens and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGES, TEXT, TOKENS = "{images}", "{text}", "{tokens}"  # placeholders of the templates


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
    """

    before: tuple[int, ...]
    image_before: tuple[int, ...]
    image_after: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    end: int
    pad: int

    @property
    def start(self) -> int:
        """First input of the decoder."""
        return self.after[-1]

    def length(self, images: int) -> int:
        """Return the number of the prompt's own tokens beside those of its images and text.

        Args:
            images: Number of images.
        """
        around = len(self.image_before) + len(self.image_after)
        return len(self.before) + images * around + len(self.between) + len(self.after) - 1


def read_template(tokenizer: Any, text: str, image: str) -> Template:
    """Convert templates of text to token ids.

    Args:
        tokenizer: The model's tokenizer, whose end token ends an answer.
        text: Prompt with the placeholders ``{images}`` and ``{text}``, in this order.
        image: Text around the tokens of one image, with the placeholder ``{tokens}``.

    Raises:
        ValueError: If a placeholder is missing, or nothing follows the text.
    """
    for template, wanted in ((text, (IMAGES, TEXT)), (image, (TOKENS,))):
        places = [template.find(part) for part in wanted]
        once = all(template.count(part) == 1 for part in wanted)
        if not once or places != sorted(places):
            raise ValueError(f"template {template!r} must have {' and '.join(wanted)} once, in this order")
    before, rest = text.split(IMAGES)
    between, after = rest.split(TEXT)
    image_before, image_after = image.split(TOKENS)

    def ids(part: str) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) if part else ()

    if not ids(after):
        raise ValueError(
            f"template {text!r} has nothing after {TEXT}: an answer needs a token to start from, e.g. a line break"
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
    )
