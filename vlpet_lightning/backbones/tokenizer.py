"""The backbone's tokenizer, extended by the original's additional tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from vlpet_lightning.backbones.folder import unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# multitask.py:55-60 of HenryHZY/VL-PET; the order matters: the order embedding of visual token i is row V-1-i
ADDED_TOKENS = [f"<extra_id_{i}>" for i in reversed(range(100))] + [f"<vis_extra_id_{i}>" for i in reversed(range(100))]


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone, as its texts are encoded (:meth:`Backbone.prepare_tokenizer`).

    Args:
        name_or_path: Folder with a saved tokenizer, or name on the Hugging Face Hub.

    Raises:
        FileNotFoundError: If it is neither in that folder nor in the local Hub cache and cannot be downloaded.
        ValueError: If one of its files is damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # transformers and tokenizers raise many types of errors
        raise unreadable(name_or_path, "tokenizer", "tokenizer.json", error) from error
    from vlpet_lightning.backbones import backbone_of  # they import this file

    backbone_of(name_or_path).prepare_tokenizer(tokenizer)
    return tokenizer
