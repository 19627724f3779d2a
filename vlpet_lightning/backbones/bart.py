"""BART: its table of sites and its joint encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bart.modeling_bart import shift_tokens_right

from vlpet_lightning.backbones.base import checked_state, quiet, weights_missing
from vlpet_lightning.backbones.visual import VisualEmbedding
from vlpet_lightning.pet.placement import Site

# facebook/bart-base, so that parameters can be counted without a download
BART_BASE: dict[str, Any] = {
    "vocab_size": 50265,
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "max_position_embeddings": 1024,
}
KNOWN_CONFIGS = {"facebook/bart-base": BART_BASE}


class Bart:
    """Facts about BART; holds no weights."""

    sites = {
        "encoder.attn": Site("encoder", "self_attn.q_proj", "self_attn.out_proj"),
        "encoder.attn.query": Site("encoder", "self_attn.q_proj", "self_attn.q_proj"),
        "encoder.attn.value": Site("encoder", "self_attn.v_proj", "self_attn.v_proj"),
        "encoder.ffn": Site("encoder", "fc1", "fc2"),
        "decoder.attn": Site("decoder", "self_attn.q_proj", "self_attn.out_proj"),
        "decoder.attn.query": Site("decoder", "self_attn.q_proj", "self_attn.q_proj"),
        "decoder.attn.value": Site("decoder", "self_attn.v_proj", "self_attn.v_proj"),
        "decoder.cross": Site("decoder", "encoder_attn.q_proj", "encoder_attn.out_proj"),
        "decoder.cross.query": Site("decoder", "encoder_attn.q_proj", "encoder_attn.q_proj"),
        "decoder.cross.key": Site("decoder", "encoder_attn.k_proj", "encoder_attn.k_proj"),
        "decoder.cross.value": Site("decoder", "encoder_attn.v_proj", "encoder_attn.v_proj"),
        "decoder.ffn": Site("decoder", "fc1", "fc2"),
    }

    def build(self, config: Any) -> BartForConditionalGeneration:
        return BartForConditionalGeneration(config)

    def config(self, name_or_path: str) -> BartConfig:
        if name_or_path in KNOWN_CONFIGS and not Path(name_or_path).exists():
            return BartConfig(**KNOWN_CONFIGS[name_or_path])
        try:
            return BartConfig.from_pretrained(name_or_path)
        except OSError as error:
            raise weights_missing(name_or_path, error) from error

    def load(self, name_or_path: str, vocabulary: int, dropout: float) -> BartForConditionalGeneration:
        try:
            with quiet():
                loaded: Any = BartForConditionalGeneration.from_pretrained(
                    name_or_path,
                    output_loading_info=True,
                    weights_only=True,
                    dtype=torch.float32,
                    dropout=dropout,
                    attention_dropout=dropout,
                    activation_dropout=dropout,
                )
        except OSError as error:
            raise weights_missing(name_or_path, error) from error
        lm, info = loaded
        checked_state(name_or_path, info)
        if vocabulary != lm.config.vocab_size:
            lm.resize_token_embeddings(
                vocabulary, mean_resizing=False
            )  # new rows N(0, init_std), as transformers 4.2.1
        return lm

    def visual_embedding(self, config: Any, feature_dim: int, grid: int | None) -> VisualEmbedding:
        return VisualEmbedding(feature_dim, config.d_model, grid=grid, init_std=config.init_std)

    def layers(self, lm: Any) -> dict[str, Sequence[nn.Module]]:
        return {"encoder": list(lm.model.encoder.layers), "decoder": list(lm.model.decoder.layers)}

    def token_embedding(self, lm: Any) -> Tensor:
        return lm.model.shared.weight

    def encode(self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor) -> Tensor:
        """Text gets positions and the embedding norm; image tokens follow as they are (modeling_bart.py: JointEncoder).

        Args:
            lm: The model.
            input_ids: ``(B, T)``.
            visual: ``(B, V, d)``.
            mask: ``(B, S)`` bool.
        """
        encoder = lm.model.encoder
        text = encoder.layernorm_embedding(encoder.embed_tokens(input_ids) + encoder.embed_positions(input_ids))
        hidden = torch.cat([text, visual.to(text.dtype)], dim=1)
        hidden = F.dropout(hidden, p=encoder.dropout, training=encoder.training)
        attention = create_bidirectional_mask(config=encoder.config, inputs_embeds=hidden, attention_mask=mask)
        for layer in encoder.layers:
            hidden = layer(hidden, attention)
        return hidden

    def decoder_inputs(self, lm: Any, labels: Tensor) -> Tensor:
        return shift_tokens_right(labels, lm.config.pad_token_id, lm.config.decoder_start_token_id)

    def answer_prefix(self, config: Any) -> list[int]:
        return [config.decoder_start_token_id, config.bos_token_id]

    def generation(self, config: Any, num_beams: int, max_length: int) -> GenerationConfig:
        """bart-base's own config blocks repeated trigrams and stops early; beam search alone forces a final ``</s>``
        (transformers 4.2.1, modeling_bart.py: adjust_logits_during_generation).
        """
        return GenerationConfig(
            num_beams=num_beams,
            max_length=max_length,
            do_sample=False,
            no_repeat_ngram_size=3,
            early_stopping=num_beams > 1,
            length_penalty=1.0,
            forced_eos_token_id=config.eos_token_id if num_beams > 1 else None,
            decoder_start_token_id=config.decoder_start_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )

    def norms(self, lm: Any, stack: str) -> dict[str, nn.Module]:
        root = f"model.{stack}"
        return {
            f"{root}.{name}": module
            for name, module in lm.get_submodule(root).named_modules()
            if isinstance(module, nn.LayerNorm)
        }
