"""The backbone's tokenizer, extended by the original's additional tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import processors
from transformers import AutoTokenizer, PretrainedConfig

from vlpet_lightning.backbones.folder import unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# multitask.py:55-60 of HenryHZY/VL-PET; the order matters: the order embedding of visual token i is row V-1-i
ADDED_TOKENS = [f"<extra_id_{i}>" for i in reversed(range(100))] + [f"<vis_extra_id_{i}>" for i in reversed(range(100))]


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone.

    That of an encoder-decoder is extended by the benchmark's 200 tokens. With that of a decoder-only model, a text ends
    with the end token.

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
    if _has_vision_tower(name_or_path):
        end_texts(tokenizer)
    else:
        tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    return tokenizer


def _has_vision_tower(name_or_path: str) -> bool:
    """Return whether a model is a decoder-only one with a tower of its own, by its configuration."""
    try:
        return "vision_config" in PretrainedConfig.get_config_dict(name_or_path)[0]
    except (OSError, ValueError):  # e.g. a folder with a tokenizer alone
        return False


def end_texts(tokenizer: Any) -> None:
    """Let every text end with the end token, and no text begin with another, in place."""
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = end
