"""The backbone's tokenizer with the vocabulary that the original adds to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from vlpet_lightning.backbones.folder import unreadable

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
        ValueError: If one of its files is damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise unreadable(name_or_path, "tokenizer", "tokenizer.json", error) from error
    tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    return tokenizer
