"""mBART: site table, joint encoder and language codes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import GenerationConfig, MBartConfig, MBartForConditionalGeneration

from vlpet_lightning.backbones.bart import BART_LARGE, CROSS, FFN, SELF, Bart
from vlpet_lightning.backbones.tokenizer import load_tokenizer
from vlpet_lightning.pet.placement import AnySite, Site

MBART_LARGE: dict[str, Any] = BART_LARGE | {"scale_embedding": True}
ENGLISH = 250004  # en_XX, in both vocabularies


class MBart(Bart):
    """mBART backbone: BART with pre-norm layers, a final norm in each stack, and scaled token embeddings.

    The tokenizer determines the language: its first and last special tokens start every answer. ``load`` stores them in
    the configuration as ``decoder_start_token_id`` and ``forced_first_token_id`` (None if answers have no further fixed
    token):

    =================  =================  ======================  =====================
    model              text               decoder_start_token_id  forced_first_token_id
    =================  =================  ======================  =====================
    mbart-large-50     ``en_XX X </s>``   ``</s>``                ``en_XX``
    mbart-large-cc25   ``X </s> en_XX``   ``en_XX``               None
    =================  =================  ======================  =====================
    """

    kind = "mbart"
    config_class = MBartConfig
    model_class = MBartForConditionalGeneration
    known: ClassVar = {
        "facebook/mbart-large-50": MBART_LARGE
        | {"vocab_size": 250054, "decoder_start_token_id": 2, "forced_first_token_id": ENGLISH},
        "facebook/mbart-large-cc25": MBART_LARGE
        | {"vocab_size": 250027, "decoder_start_token_id": ENGLISH, "forced_first_token_id": None},
    }
    order: ClassVar = {
        "encoder": [("self_attn_layer_norm",), *SELF, ("final_layer_norm",), *FFN],
        "decoder": [
            *[("self_attn_layer_norm",), *SELF],
            *[("encoder_attn_layer_norm",), *CROSS],
            *[("final_layer_norm",), *FFN],
        ],
    }
    final_norm = ("layer_norm",)
    required = ("eos_token_id", "pad_token_id")
    # a sublayer begins with its norm, whose input is the residual stream
    sites: ClassVar[dict[str, AnySite]] = Bart.sites | {
        "encoder.attn": Site("encoder", "self_attn_layer_norm", "self_attn.out_proj"),
        "encoder.ffn": Site("encoder", "final_layer_norm", "fc2"),
        "decoder.attn": Site("decoder", "self_attn_layer_norm", "self_attn.out_proj"),
        "decoder.cross": Site("decoder", "encoder_attn_layer_norm", "encoder_attn.out_proj"),
        "decoder.ffn": Site("decoder", "final_layer_norm", "fc2"),
    }

    def load(self, name_or_path: str, vocabulary: int, dropout: float) -> Any:
        lm = super().load(name_or_path, vocabulary, dropout)
        special = load_tokenizer(name_or_path)("").input_ids
        if lm.config.eos_token_id not in special:
            raise ValueError(
                f"the tokenizer of {name_or_path!r} must end a text with token {lm.config.eos_token_id} (</s>), it "
                f"adds {special}: give an mBART with an MBart50Tokenizer or MBartTokenizer"
            )
        set_language(lm.config, special)
        return lm

    def build(self, config: Any) -> Any:
        """Build a randomly initialised model; without a tokenizer, its answers start with ``</s>`` alone."""
        if config.decoder_start_token_id is None:
            set_language(config, [config.eos_token_id])
        return super().build(config)

    def run_encoder(self, lm: Any, encoder: Any, hidden: Tensor, text: int, mask: Tensor) -> Tensor:
        """Run the layers as in BART, and the final norm over text and image tokens."""
        return encoder.layer_norm(super().run_encoder(lm, encoder, hidden, text, mask))

    def answer_prefix(self, config: Any) -> list[int]:
        first = forced_first_token(config)
        return [config.decoder_start_token_id] + ([] if first is None else [first])

    def generation(self, config: Any, num_beams: int, max_length: int) -> GenerationConfig:
        """Return the decoding settings of mbart-large-50's own config, with the language of the tokenizer."""
        settings = super().generation(config, num_beams, max_length)
        settings.update(no_repeat_ngram_size=None, forced_bos_token_id=forced_first_token(config))
        return settings


def set_language(config: Any, special: list[int]) -> None:
    """Set the tokens that every answer starts with.

    Args:
        config: Configuration to change.
        special: Tokens of an empty text. The last one starts the decoder, the one before ``</s>`` follows it.
    """
    before = special[: special.index(config.eos_token_id)]
    config.decoder_start_token_id = special[-1]
    config.forced_first_token_id = before[0] if before else None


def forced_first_token(config: Any) -> int | None:
    """Return the token that every answer starts with, after the decoder's start token."""
    return getattr(config, "forced_first_token_id", None)
