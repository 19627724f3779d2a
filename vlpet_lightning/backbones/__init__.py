"""Backbones: the only package that imports ``transformers.models``."""

from pathlib import Path

from transformers import PretrainedConfig

from vlpet_lightning.backbones.bart import Bart
from vlpet_lightning.backbones.base import Backbone
from vlpet_lightning.backbones.folder import damaged_weights, first_line, unreadable
from vlpet_lightning.backbones.llava_onevision import LlavaOnevision
from vlpet_lightning.backbones.loading import check_compilable
from vlpet_lightning.backbones.mbart import MBart
from vlpet_lightning.backbones.paligemma import PaliGemma
from vlpet_lightning.backbones.qwen25vl import Qwen25VL
from vlpet_lightning.backbones.smolvlm import Idefics3, SmolVLM
from vlpet_lightning.backbones.t5 import T5
from vlpet_lightning.backbones.tokenizer import ADDED_TOKENS, load_tokenizer
from vlpet_lightning.backbones.visual import VisualEmbedding, pool_grid

BACKBONES: dict[str, Backbone] = {
    backbone.kind: backbone
    for backbone in (Bart(), MBart(), T5(), Idefics3(), SmolVLM(), PaliGemma(), Qwen25VL(), LlavaOnevision())
}


def config_of(name_or_path: str, kind: str) -> PretrainedConfig:
    """Return the configuration of a pretrained model.

    Args:
        name_or_path: Folder or Hub name.
        kind: Backbone that reads the configuration if the name is not known to any.

    Raises:
        FileNotFoundError: If the name is not known and no configuration is found.
        ValueError: If the configuration file is damaged.
    """
    owner = next((backbone for backbone in BACKBONES.values() if name_or_path in backbone.known), BACKBONES[kind])
    return owner.config(name_or_path)


def backbone_of(name_or_path: str) -> Backbone:
    """Return the description of a pretrained model by the kind in its configuration.

    Raises:
        FileNotFoundError: If the name is not known and no configuration is found.
        ValueError: If the configuration is damaged, or the model is of another kind.
    """
    owner = next((backbone for backbone in BACKBONES.values() if name_or_path in backbone.known), None)
    if owner is not None:
        return owner
    try:
        kind = PretrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise unreadable(name_or_path, "pretrained model", "config.json", error) from error
    if kind not in BACKBONES:
        raise ValueError(f"{name_or_path!r} is a {kind} model: the backbones are {', '.join(sorted(BACKBONES))}")
    return BACKBONES[kind]


def vocabulary_size(name_or_path: str, config: PretrainedConfig) -> int:
    """Return the number of token embedding rows, including the benchmark's added tokens.

    A saved backbone may already include them, according to its own tokenizer. A backbone known by name never does.
    """
    backbone = BACKBONES[config.model_type]
    pretrained = backbone.text_config(config).vocab_size
    if backbone.added_vocabulary and Path(name_or_path, "tokenizer.json").is_file():
        return max(pretrained, len(load_tokenizer(name_or_path)))
    return pretrained + backbone.added_vocabulary


__all__ = [
    "ADDED_TOKENS",
    "BACKBONES",
    "Backbone",
    "VisualEmbedding",
    "backbone_of",
    "check_compilable",
    "config_of",
    "damaged_weights",
    "first_line",
    "load_tokenizer",
    "pool_grid",
    "vocabulary_size",
]
