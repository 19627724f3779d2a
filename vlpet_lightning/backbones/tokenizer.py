"""The backbone's tokenizer with the vocabulary that the original adds to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# multitask.py:55-60 of HenryHZY/VL-PET; the order matters: the visual order embedding of token i is row V-1-i
ADDED_TOKENS = [f"<extra_id_{i}>" for i in reversed(range(100))] + [f"<vis_extra_id_{i}>" for i in reversed(range(100))]


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone, extended by the 200 tokens of the benchmark.

    Args:
        name_or_path: A folder with a saved tokenizer, or a name on the Hugging Face hub.

    Raises:
        FileNotFoundError: If it is neither in that folder nor in the local hub cache and cannot be fetched.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no tokenizer at {name_or_path!r}: give a folder with tokenizer.json, or fetch it once with "
            f"`hf download {name_or_path}` on a machine that reaches the hub"
        ) from error
    tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    return tokenizer
