"""BART: site table and joint encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig
from transformers.models.bart.modeling_bart import shift_tokens_right

from vlpet_lightning.backbones.base import STACKS, Backbone, VocabularyProjection, narrow_config
from vlpet_lightning.backbones.masks import additive
from vlpet_lightning.backbones.visual import Projector, VisualEmbedding
from vlpet_lightning.pet.placement import AnySite, PromptSite, SideSite, Site

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
BART_LARGE = BART_BASE | {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
}


def _attention(stack: str, name: str) -> dict[str, Site]:
    """Return the sites of one attention module by suffix."""
    sites = {"": Site(stack, f"{name}.q_proj", f"{name}.out_proj")}
    sites |= {f".{part}": Site(stack, f"{name}.{part[0]}_proj", f"{name}.{part[0]}_proj") for part in KINDS}
    return sites


KINDS = ("query", "key", "value")


def _computed(attention: str) -> list[tuple[str, ...]]:
    """Return the projections of an attention module in the order of computation."""
    return [tuple(f"{attention}.{name}_proj" for name in "qkv"), (f"{attention}.out_proj",)]


SELF, CROSS = _computed("self_attn"), _computed("encoder_attn")
FFN: list[tuple[str, ...]] = [("fc1",), ("fc2",)]


class Zero(nn.Module):
    """Position embedding of a decoder whose input has its positions already."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.zero


class Bart(Backbone):
    """BART backbone."""

    kind = "bart"
    config_class: ClassVar[Any] = BartConfig
    model_class: ClassVar[Any] = BartForConditionalGeneration
    known: ClassVar = {"facebook/bart-base": BART_BASE, "facebook/bart-large": BART_LARGE}
    dropouts = ("dropout", "attention_dropout", "activation_dropout")
    added_vocabulary = 200  # <extra_id_99..0> and <vis_extra_id_99..0>: see vlpet_lightning/backbones/tokenizer.py
    norm_places: ClassVar = {
        "embedding": "layernorm_embedding",
        "attn": "self_attn_layer_norm",
        "cross": "encoder_attn_layer_norm",
        "ffn": "final_layer_norm",
    }
    sites: ClassVar[dict[str, AnySite]] = {
        "encoder.prompt": PromptSite("encoder"),
        **{f"encoder.attn{part}": site for part, site in _attention("encoder", "self_attn").items()},
        "encoder.ffn": Site("encoder", "fc1", "fc2"),
        "encoder.ffn.inner": Site("encoder", "fc2", "fc2", side="input"),
        "decoder.prompt": PromptSite("decoder"),
        **{f"decoder.attn{part}": site for part, site in _attention("decoder", "self_attn").items()},
        **{f"decoder.cross{part}": site for part, site in _attention("decoder", "encoder_attn").items()},
        "decoder.cross.memory": Site(
            "decoder", "encoder_attn.k_proj", "encoder_attn.k_proj", side="input", also="encoder_attn.v_proj"
        ),
        "decoder.ffn": Site("decoder", "fc1", "fc2"),
        "decoder.ffn.inner": Site("decoder", "fc2", "fc2", side="input"),
        "side": SideSite(),
    }

    # modules of a layer in the order of computation, and the norm at the end of a stack
    order: ClassVar[dict[str, list[tuple[str, ...]]]] = {
        "encoder": [*SELF, ("self_attn_layer_norm",), *FFN, ("final_layer_norm",)],
        "decoder": [
            *[*SELF, ("self_attn_layer_norm",)],
            *[*CROSS, ("encoder_attn_layer_norm",)],
            *[*FFN, ("final_layer_norm",)],
        ],
    }
    final_norm: ClassVar[tuple[str, ...]] = ()

    def visual_embedding(
        self, lm: Any, feature_dim: int, grid: int | None, projector: Projector | None = None
    ) -> VisualEmbedding:
        scale = math.sqrt(lm.config.d_model) if lm.config.scale_embedding else 1.0
        settings: dict[str, Any] = {"grid": grid, "init_std": lm.config.init_std, "projector": projector}
        return VisualEmbedding(feature_dim, lm.config.d_model, order_scale=scale, **settings)

    def stack_layers(self, stack: Any) -> Sequence[nn.Module]:
        return stack.layers

    def stack_embedding(self, stack: Any) -> nn.Module:
        return stack.layernorm_embedding

    def narrow_stack(self, lm: Any, name: str, reduction: int, layers: int) -> nn.Module:
        """Build a stack whose input is the embedded text of the backbone, with its positions and after its norm."""
        stack = self.stack(lm, name)
        config = narrow_config(stack.config, reduction, ("d_model", f"{name}_ffn_dim"))
        heads = getattr(config, f"{name}_attention_heads")
        if config.d_model % heads:
            raise ValueError(
                f"a reduction of {reduction} gives a width of {config.d_model}, which the {heads} attention heads of "
                f"the {name} do not divide: choose a smaller one"
            )
        sizes = {f"{name}_layers": layers, "vocab_size": config.pad_token_id + 1, "max_position_embeddings": 1}
        config.update(sizes)
        narrow = type(stack)(config)
        del narrow.embed_tokens
        narrow.embed_positions, narrow.layernorm_embedding = Zero(), nn.Identity()
        return narrow

    def pruning_chains(self, lm: Any) -> list[list[tuple[str, ...]]]:
        return [
            [
                tuple(f"{self.stack_path(stack)}.layers.{index}.{name}" for name in names)
                for index in range(len(self.stack_layers(self.stack(lm, stack))))
                for names in self.order[stack]
            ]
            + [(f"{self.stack_path(stack)}.{name}",) for name in self.final_norm]
            for stack in STACKS
        ]

    def stack_path(self, name: str) -> str:
        return f"model.{name}"

    def encode(
        self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: nn.Module | None = None
    ) -> Tensor:
        """Run the joint encoder as in the original (src/modeling_bart.py: JointEncoder).

        Position embeddings are added to the text, and the embedding norm is applied to prompt and text. Image tokens
        are appended unchanged.
        """
        encoder = lm.model.encoder
        text = encoder.embed_tokens(input_ids) + encoder.embed_positions(input_ids)
        text = encoder.layernorm_embedding(text if prompt is None else prompt(text, text))
        return self.run_encoder(lm, encoder, torch.cat([text, visual.to(text.dtype)], dim=1), text.shape[1], mask)

    def run_encoder(self, lm: Any, encoder: Any, hidden: Tensor, text: int, mask: Tensor) -> Tensor:
        hidden = F.dropout(hidden, p=encoder.dropout, training=encoder.training)
        attention = self.attention_mask(lm, mask)
        for layer in encoder.layers:
            hidden = layer(hidden, attention)
        return hidden

    def attention_mask(self, lm: Any, mask: Tensor) -> Tensor:
        mask = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
        if lm.config._attn_implementation == "sdpa":
            return mask
        return additive(mask, lm.dtype)

    def vocabulary_projection(self, lm: Any) -> VocabularyProjection:
        return VocabularyProjection(lm.lm_head, lm.final_logits_bias[0])

    def decoder_inputs(self, lm: Any, labels: Tensor) -> Tensor:
        return shift_tokens_right(labels, lm.config.pad_token_id, lm.config.decoder_start_token_id)

    def answer_prefix(self, config: Any) -> list[int]:
        return [config.decoder_start_token_id, config.bos_token_id]

    def generation(self, config: Any, num_beams: int, max_length: int) -> GenerationConfig:
        """Return the decoding settings of bart-base's own config, which blocks repeated trigrams and stops early.

        Only beam search forces a final ``</s>`` (transformers 4.2.1, modeling_bart.py:
        adjust_logits_during_generation).
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
