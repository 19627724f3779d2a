"""Configuration, settings and weights of a pretrained model of some kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from vlpet_lightning.backbones.folder import WEIGHTS, unreadable
from vlpet_lightning.backbones.loading import checked_state, quiet

Described = TypeVar("Described", bound="PretrainedKind")


class PretrainedKind:
    """Loading of pretrained models of a kind.

    Attributes:
        kind: ``config.model_type``.
        known: Configurations of pretrained models, which allow counting parameters without a download.
        dropouts: Names of the configuration's dropout rates.
        required: Settings that ``config.json`` must have.
    """

    kind: ClassVar[str]
    known: ClassVar[dict[str, dict[str, Any]]]
    dropouts: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]] = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    config_class: ClassVar[Any]
    model_class: ClassVar[Any]

    def build(self, config: Any) -> Any:
        """Build a randomly initialised model on the current default device."""
        return self.model_class(config)

    def load(self, name_or_path: str, vocabulary: int, dropout: float) -> Any:
        """Load the pretrained model in float32.

        Args:
            name_or_path: Folder or Hub name.
            vocabulary: Number of rows to which the vocabulary is extended.
            dropout: Dropout rate, used everywhere.

        Raises:
            FileNotFoundError: If the weights are not found.
            ValueError: If they are damaged or incomplete.
        """
        try:
            with quiet():
                loaded: Any = self.from_pretrained(
                    name_or_path,
                    output_loading_info=True,
                    weights_only=True,
                    dtype=torch.float32,
                    **dict.fromkeys(self.dropouts, dropout),
                )
        except (OSError, SafetensorError) as error:
            raise unreadable(name_or_path, "pretrained weights", WEIGHTS, error) from error
        lm, info = loaded
        checked_state(name_or_path, info)
        if vocabulary != self.text_config(lm.config).vocab_size:
            self.resize(lm, vocabulary)
        return lm

    def from_pretrained(self, name_or_path: str, **settings: Any) -> Any:
        """Return what ``from_pretrained`` of the model's class returns for these settings."""
        return self.model_class.from_pretrained(name_or_path, **settings)

    def check_whole(self, lm: Any) -> None:
        """Check that all weights of a model are loaded.

        Raises:
            ValueError: If it was loaded for training, without parts that training does not run.
        """

    def resize(self, lm: Any, vocabulary: int) -> None:
        """Resize the vocabulary; new rows get the model's own initialisation, as in transformers 4.2.1."""
        lm.resize_token_embeddings(vocabulary, mean_resizing=False)

    def configured(self, config: Any, vocabulary: int, dropout: float) -> Any:
        """Set the size of the vocabulary and the dropout rate of a configuration, in place."""
        config.update({"vocab_size": vocabulary, **dict.fromkeys(self.dropouts, dropout)})
        return config

    def with_settings(self: Described, name_or_path: str, settings: Mapping[str, Any] | None) -> Described:
        """Return this description with settings of its own, such as a prompt template; see :meth:`settings`.

        Args:
            name_or_path: Folder or Hub name of the model.
            settings: The settings, or None for the default.
        """
        return self

    def sizes(self, config: Any) -> dict[str, Any]:
        """Return the sizes of a model that distinguish it from others of its kind."""
        return {key: getattr(config, key) for key in sorted(next(iter(self.known.values()))) if key != "vocab_size"}

    def settings(self) -> dict[str, Any] | None:
        """Return the settings as plain data; None if there are none."""
        return None

    def save_processor(self, name_or_path: str, folder: Path) -> None:
        """Copy the image processor of a model that has one to a folder."""

    def config(self, name_or_path: str) -> Any:
        """Return the configuration of a pretrained model, without loading weights.

        Raises:
            FileNotFoundError: If the name is not known and no configuration is found.
            ValueError: If the configuration file is damaged or lacks a required setting.
        """
        if name_or_path in self.known and not Path(name_or_path).exists():
            return self.config_class(**self.known[name_or_path])
        try:
            config = AutoConfig.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise unreadable(name_or_path, "pretrained model", "config.json", error) from error
        if config.model_type == self.kind:
            self.check_config(name_or_path, config)
        return config

    def check_config(self, name_or_path: str, config: Any) -> None:
        """Check that a configuration has what the model needs.

        Raises:
            ValueError: If a required setting is missing; the message names it.
        """
        missing = [name for name in self.required if getattr(config, name, None) is None]
        if missing:
            raise ValueError(
                f"the config.json of {name_or_path!r} does not set {', '.join(missing)}: add the values that the model "
                "was pretrained with"
            )

    def text_config(self, config: Any) -> Any:
        """Return the part of a configuration that describes the language model."""
        return config
