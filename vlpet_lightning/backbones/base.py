"""What a backbone must say about itself: where its layers and sites are, and how text and image tokens are joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from vlpet_lightning.backbones.folder import WEIGHTS, unreadable
from vlpet_lightning.backbones.visual import Projector, VisualEmbedding
from vlpet_lightning.pet.placement import PromptSite, Site

COMPILES_FROM = (5, 23)


class Backbone:
    """An encoder-decoder language model and the facts about it that nobody else needs to know; holds no weights.

    Attributes:
        kind: ``config.model_type``.
        sites: Where units may go.
        added_vocabulary: Rows that the benchmark adds to the pretrained model's vocabulary.
        norm_places: By place, what the name of a norm ends with: the norms that belong to a sublayer.
        known: Configurations of pretrained models, so that parameters can be counted without a download.
        dropouts: Names of the configuration's dropout rates.
        stock_beams: Whether the library's beam search gives the answers of transformers 4.2.1 under this backbone's
            settings; otherwise :mod:`vlpet_lightning.beam_search` is used.
    """

    kind: ClassVar[str]
    sites: ClassVar[dict[str, Site | PromptSite]]
    added_vocabulary: ClassVar[int]
    norm_places: ClassVar[dict[str, str]]
    known: ClassVar[dict[str, dict[str, Any]]]
    dropouts: ClassVar[tuple[str, ...]]
    stock_beams: ClassVar[bool]
    config_class: ClassVar[Any]
    model_class: ClassVar[Any]

    def build(self, config: Any) -> Any:
        """A randomly initialised model of that configuration (on the current default device)."""
        return self.model_class(config)

    def load(self, name_or_path: str, vocabulary: int, dropout: float) -> Any:
        """The pretrained model in float32, its vocabulary grown to ``vocabulary`` rows, one dropout rate everywhere.

        Raises:
            FileNotFoundError: If the weights are not there.
            ValueError: If they are damaged, or do not fill the model.
        """
        try:
            with quiet():
                loaded: Any = self.model_class.from_pretrained(
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
        if vocabulary != lm.config.vocab_size:
            # new rows are drawn as the model draws its own, as transformers 4.2.1 did
            lm.resize_token_embeddings(vocabulary, mean_resizing=False)
        return lm

    def config(self, name_or_path: str) -> Any:
        """The configuration of a pretrained model, without its weights.

        Raises:
            FileNotFoundError: If it is neither known nor there.
            ValueError: If its file is damaged.
        """
        if name_or_path in self.known and not Path(name_or_path).exists():
            return self.config_class(**self.known[name_or_path])
        try:
            return AutoConfig.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise unreadable(name_or_path, "pretrained model", "config.json", error) from error

    def visual_embedding(
        self, config: Any, feature_dim: int, grid: int | None, projector: Projector | None = None
    ) -> VisualEmbedding:
        """The visual embedding in this backbone's norms and initialisation."""
        raise NotImplementedError

    def layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        """The layers of each stack."""
        raise NotImplementedError

    def stack(self, lm: Any, name: str) -> Any:
        """The encoder or the decoder."""
        return lm.get_submodule(self.stack_path(name))

    def stack_path(self, name: str) -> str:
        """Name of the encoder or decoder below the language model."""
        raise NotImplementedError

    def token_embedding(self, lm: Any) -> Tensor:
        """``(vocabulary, d)``."""
        return lm.get_input_embeddings().weight

    def encode(
        self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: nn.Module | None = None
    ) -> Tensor:
        """Run the joint encoder over ``[prompt, text, visual]``.

        Args:
            lm: The model.
            input_ids: ``(B, T)``.
            visual: ``(B, V, d)``.
            mask: ``(B, S)`` bool.
            prompt: A unit that puts its tokens in front of the embedded text.

        Returns:
            ``(B, S, d)``.
        """
        raise NotImplementedError

    def decoder_prefix(self, lm: Any, tokens: Tensor) -> Any:
        """A cache filled by a pass of the decoder over embedded tokens ``(B, P, d)``, without the encoder's output
        (src/modeling_bart.py, VLBartModel.forward: ``decoder_prompt_config``).
        """
        return self.stack(lm, "decoder")(inputs_embeds=tokens, use_cache=True).past_key_values

    def decoder_inputs(self, lm: Any, labels: Tensor) -> Tensor:
        """Targets shifted right behind the start token; ``(B, L)``."""
        raise NotImplementedError

    def answer_prefix(self, config: Any) -> list[int]:
        """Decoder tokens before the first token of an answer."""
        raise NotImplementedError

    def generation(self, config: Any, num_beams: int, max_length: int) -> GenerationConfig:
        """The original's decoding settings for this backbone."""
        raise NotImplementedError

    def norms(self, lm: Any, stack: str) -> dict[str, nn.Module]:
        """The norms of a stack by name below the language model; those of units are not among them."""
        root = self.stack_path(stack)
        return {
            f"{root}.{name}": module
            for name, module in self.stack(lm, stack).named_modules()
            if type(module).__name__.endswith("LayerNorm") and ".unit." not in name and ".input_unit." not in name
        }


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
