"""Backbones: the only place that imports ``transformers.models``."""

from pathlib import Path

from transformers import PretrainedConfig

from vlpet_lightning.backbones.bart import Bart
from vlpet_lightning.backbones.base import ADDED_VOCABULARY, Backbone, check_compilable
from vlpet_lightning.backbones.tokenizer import ADDED_TOKENS, load_tokenizer
from vlpet_lightning.backbones.visual import VisualEmbedding, pool_grid

BACKBONES: dict[str, Backbone] = {"bart": Bart()}  # by config.model_type


def vocabulary_size(name_or_path: str, config: PretrainedConfig) -> int:
    """Rows of the token embedding once the benchmark's tokens are added.

    A saved backbone may have them already (its own tokenizer says so); one known by name never has.
    """
    if Path(name_or_path, "tokenizer.json").is_file():
        return max(config.vocab_size, len(load_tokenizer(name_or_path)))
    return config.vocab_size + ADDED_VOCABULARY


__all__ = [
    "ADDED_TOKENS",
    "ADDED_VOCABULARY",
    "BACKBONES",
    "Backbone",
    "VisualEmbedding",
    "check_compilable",
    "load_tokenizer",
    "pool_grid",
    "vocabulary_size",
]
