"""What a backbone must say about itself: where its layers and sites are, and how text and image tokens are joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import transformers
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from vlpet_lightning.backbones.visual import VisualEmbedding
from vlpet_lightning.pet.placement import Site

COMPILES_FROM = (5, 23)
ADDED_VOCABULARY = 200  # rows that the benchmark adds: see vlpet_lightning/backbones/tokenizer.py


class Backbone(Protocol):
    """An encoder-decoder language model and the facts about it that nobody else needs to know."""

    sites: dict[str, Site]

    def build(self, config: Any) -> Any:
        """A randomly initialised model of that configuration (on the current default device)."""

    def load(self, name_or_path: str, vocabulary: int, dropout: float) -> Any:
        """The pretrained model in float32, its vocabulary grown to ``vocabulary`` rows, one dropout rate everywhere."""

    def config(self, name_or_path: str) -> Any:
        """The configuration of a pretrained model, without its weights."""

    def visual_embedding(self, config: Any, feature_dim: int, grid: int | None) -> VisualEmbedding:
        """The visual embedding in this backbone's norms and initialisation."""

    def layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        """The layers of each stack."""

    def token_embedding(self, lm: Any) -> Tensor:
        """``(vocabulary, d)``."""

    def encode(self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor) -> Tensor:
        """Run the joint encoder over ``[text, visual]``; ``(B, S, d)``."""

    def decoder_inputs(self, lm: Any, labels: Tensor) -> Tensor:
        """Targets shifted right behind the start token; ``(B, L)``."""

    def answer_prefix(self, config: Any) -> list[int]:
        """Decoder tokens before the first token of an answer."""

    def generation(self, config: Any, num_beams: int, max_length: int) -> GenerationConfig:
        """The original's decoding settings for this backbone."""

    def norms(self, lm: Any, stack: str) -> dict[str, nn.Module]:
        """The norms of a stack by name below the language model."""


def check_compilable(installed: str = transformers.__version__) -> None:
    """Refuse to compile where the language model's own code would break the graph.

    Raises:
        ValueError: If transformers is older than 5.23: its BART draws and compares a random number in every layer.
    """
    if tuple(map(int, installed.split(".")[:2])) < COMPILES_FROM:
        wanted = ".".join(map(str, COMPILES_FROM))
        raise ValueError(
            f"compile_model needs transformers {wanted} or newer, which needs Python 3.11; {installed} is installed: "
            "take a newer Python, or leave compile_model away"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bar and load report: :func:`checked_state` says what matters."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def weights_missing(name_or_path: str, error: Exception) -> FileNotFoundError:
    """The one message for pretrained weights that are not there."""
    return FileNotFoundError(
        f"no pretrained weights at {name_or_path!r}: give a folder with config.json and model.safetensors, or fetch "
        f"them once with `hf download {name_or_path}` on a machine that reaches the hub "
        f"({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    )


def checked_state(name_or_path: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fill the model.

    Raises:
        ValueError: If keys are missing from it, beyond tied copies that the library fills itself.
    """
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ValueError(
            f"the weights at {name_or_path!r} lack {len(missing)} tensors of the model, e.g. {missing[:3]}"
        )
