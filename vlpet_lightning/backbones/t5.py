"""T5: site table and joint encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5LayerNorm

from vlpet_lightning.backbones.base import STACKS, Backbone, VocabularyProjection, narrow_config, plain_search
from vlpet_lightning.backbones.masks import additive
from vlpet_lightning.backbones.visual import Projector, VisualEmbedding
from vlpet_lightning.pet.placement import AnySite, PromptSite, SideSite, Site

T5_BASE: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "decoder_start_token_id": 0,
}
T5_SMALL = T5_BASE | {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
T5_LARGE = T5_BASE | {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}
# T5 v1.1 and Flan-T5: a gated feed-forward network, and an output layer that is not tied to the token embedding
V1_1: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
V1_1_SMALL = T5_BASE | V1_1 | {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
V1_1_BASE = T5_BASE | V1_1 | {"d_ff": 2048}
V1_1_LARGE = T5_LARGE | V1_1 | {"d_ff": 2816}

# the output projection of each sublayer's computation, and the names of projections of its input
SUBLAYERS = {"SelfAttention": "o", "EncDecAttention": "o", "DenseReluDense": "wo"}
INPUTS = ("q", "k", "v", "wi", "wi_0", "wi_1")


def _attention(stack: str, name: str) -> dict[str, Site]:
    """Return the sites of one attention module by suffix; ``x`` is the residual stream before the norm."""
    norm = f"{name.rpartition('.')[0]}.layer_norm"
    sites = {"": Site(stack, norm, f"{name}.o")}
    sites |= {f".{part}": Site(stack, f"{name}.{part[0]}", f"{name}.{part[0]}") for part in ("query", "key", "value")}
    return sites


def _ffn(stack: str, name: str) -> dict[str, Site]:
    inner = f"{name}.DenseReluDense.wo"
    return {"": Site(stack, f"{name}.layer_norm", inner), ".inner": Site(stack, inner, inner, side="input")}


def keep_untied(lm: Any) -> None:
    """Keep an output layer of its own: transformers would tie it to the token embedding when it resizes either."""
    lm._tied_weights_keys = {key: source for key, source in lm._tied_weights_keys.items() if key != "lm_head.weight"}
    lm.all_tied_weights_keys.pop("lm_head.weight", None)


def _drop_first(dense: Any) -> None:
    """Apply dropout before the activation of a feed-forward sublayer, if that is a ReLU without a second factor.

    Both orders compute the same. In this one, the ReLU and the second projection save the same tensor for the backward
    pass.
    """
    if isinstance(dense, T5DenseActDense) and isinstance(dense.act, nn.ReLU):
        dense.act, dense.dropout = dense.dropout, dense.act


class T5(Backbone):
    """T5 backbone, including T5 v1.1 and Flan-T5."""

    kind = "t5"
    config_class: ClassVar[Any] = T5Config
    model_class: ClassVar[Any] = T5ForConditionalGeneration
    known: ClassVar = {
        "t5-base": T5_BASE,
        "google-t5/t5-base": T5_BASE,
        "t5-small": T5_SMALL,
        "google-t5/t5-small": T5_SMALL,
        "t5-large": T5_LARGE,
        "google-t5/t5-large": T5_LARGE,
        "google/t5-v1_1-small": V1_1_SMALL,
        "google/t5-v1_1-base": V1_1_BASE,
        "google/t5-v1_1-large": V1_1_LARGE,
        "google/flan-t5-small": V1_1_SMALL,
        "google/flan-t5-base": V1_1_BASE,
        "google/flan-t5-large": V1_1_LARGE,
    }
    dropouts = ("dropout_rate",)
    added_vocabulary = 72  # 32,000 pieces, 100 <extra_id>, 100 <vis_extra_id>: 32,200 rows instead of t5-base's 32,128
    norm_places: ClassVar = {
        "attn": "layer.0.layer_norm",
        "cross": "layer.1.layer_norm",
        "ffn": "layer.2.layer_norm",
        "final": "final_layer_norm",
    }
    sites: ClassVar[dict[str, AnySite]] = {
        "encoder.prompt": PromptSite("encoder"),
        **{f"encoder.attn{part}": site for part, site in _attention("encoder", "layer.0.SelfAttention").items()},
        **{f"encoder.ffn{part}": site for part, site in _ffn("encoder", "layer.1").items()},
        "decoder.prompt": PromptSite("decoder"),
        **{f"decoder.attn{part}": site for part, site in _attention("decoder", "layer.0.SelfAttention").items()},
        **{f"decoder.cross{part}": site for part, site in _attention("decoder", "layer.1.EncDecAttention").items()},
        "decoder.cross.memory": Site(
            "decoder",
            "layer.1.EncDecAttention.k",
            "layer.1.EncDecAttention.k",
            side="input",
            also="layer.1.EncDecAttention.v",
        ),
        **{f"decoder.ffn{part}": site for part, site in _ffn("decoder", "layer.2").items()},
        "side": SideSite(),
    }

    def build(self, config: Any) -> Any:
        """Build a randomly initialised model; transformers ties the output layer of T5 v1.1, whose own is untied."""
        lm = super().build(config)
        if self.vocabulary_projection(lm).scale == 1:
            lm.lm_head.weight = nn.Parameter(torch.empty_like(lm.shared.weight))
            nn.init.normal_(lm.lm_head.weight, std=config.initializer_factor)
            keep_untied(lm)
        return lm

    def resize(self, lm: Any, vocabulary: int) -> None:
        """Resize the vocabulary; new rows of an untied output layer are the mean of the pretrained ones.

        Thus an added token, which is never a target, is never the most probable one.
        """
        pretrained = lm.lm_head.weight
        if pretrained is lm.shared.weight:
            super().resize(lm, vocabulary)
            return
        keep_untied(lm)
        super().resize(lm, vocabulary)
        with torch.no_grad():
            lm.lm_head.weight[len(pretrained) :] = pretrained.mean(dim=0)

    def visual_embedding(
        self, lm: Any, feature_dim: int, grid: int | None, projector: Projector | None = None
    ) -> VisualEmbedding:
        """Use T5's norms and torch's initialisation, which T5's own does not change (src/modeling_t5.py)."""
        norm: Any = partial(T5LayerNorm, eps=lm.config.layer_norm_epsilon)
        return VisualEmbedding(feature_dim, lm.config.d_model, grid=grid, norm=norm, init_std=None, projector=projector)

    def stack_layers(self, stack: Any) -> Sequence[nn.Module]:
        return stack.block

    def stack_embedding(self, stack: Any) -> nn.Module:
        return stack.embed_tokens

    def narrow_stack(self, lm: Any, name: str, reduction: int, layers: int) -> nn.Module:
        stack = self.stack(lm, name)
        config = narrow_config(stack.config, reduction, ("d_model", "d_kv", "d_ff"))
        config.update({"num_layers": layers, "vocab_size": 1})
        narrow = type(stack)(config)
        narrow.apply(lm._init_weights)  # with the deviations for the whole width, as in the original
        del narrow.embed_tokens
        for block in narrow.block:
            _drop_first(block.layer[-1].DenseReluDense)
        return narrow

    def pruning_chains(self, lm: Any) -> list[list[tuple[str, ...]]]:
        """Return one chain over encoder and decoder, as the original's (VL-T5/src/pruning/pruning_methods.py)."""
        chain: list[tuple[str, ...]] = []
        for stack in STACKS:
            for index, block in enumerate(self.stack_layers(self.stack(lm, stack))):
                for number, sublayer in enumerate(block.layer):  # type: ignore[arg-type]
                    path = f"{self.stack_path(stack)}.block.{index}.layer.{number}"
                    inner = next(name for name, _ in sublayer.named_children() if name in SUBLAYERS)
                    matrices = [name for name, _ in sublayer.get_submodule(inner).named_children() if name in INPUTS]
                    chain.append((f"{path}.layer_norm",))
                    chain.append(tuple(f"{path}.{inner}.{name}" for name in matrices))
                    chain.append((f"{path}.{inner}.{SUBLAYERS[inner]}",))
            chain.append((f"{self.stack_path(stack)}.final_layer_norm",))
        return [chain]

    def stack_path(self, name: str) -> str:
        return name

    def encode(
        self, lm: Any, input_ids: Tensor, visual: Tensor, mask: Tensor, prompt: nn.Module | None = None
    ) -> Tensor:
        """Run the joint encoder, with relative positions only between prompt and text tokens.

        This follows the original (src/modeling_t5.py: JointEncoder). The mask is merged into the position bias,
        because releases of transformers differ in which of the two they add to the scores.
        """
        text = lm.encoder.embed_tokens(input_ids)
        if prompt is not None:
            text = prompt(text, text)
        return self.run_encoder(lm, lm.encoder, torch.cat([text, visual.to(text.dtype)], dim=1), text.shape[1], mask)

    def run_encoder(self, lm: Any, encoder: Any, hidden: Tensor, text: int, mask: Tensor) -> Tensor:
        hidden, images = encoder.dropout(hidden), hidden.shape[1] - text
        relative = encoder.block[0].layer[0].SelfAttention.compute_bias(text, text, device=hidden.device)
        bias = nn.functional.pad(relative, (0, images, 0, images))  # (1, heads, S, S)
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
        for block in encoder.block:
            # positional arguments: gradient checkpointing does not handle keyword arguments
            hidden = block(hidden, None, bias)[0]
        return encoder.dropout(encoder.final_layer_norm(hidden))

    def attention_mask(self, lm: Any, mask: Tensor) -> Tensor:
        """Return an additive mask: releases of transformers differ in whether T5 accepts a bool mask."""
        return additive(mask[:, None] if mask.dim() == 3 else mask[:, None, None], torch.float32)

    def vocabulary_projection(self, lm: Any) -> VocabularyProjection:
        scaled = getattr(lm.config, "scale_decoder_outputs", lm.config.tie_word_embeddings)
        return VocabularyProjection(lm.lm_head, scale=lm.model_dim**-0.5 if scaled else 1.0)

    def decoder_inputs(self, lm: Any, labels: Tensor) -> Tensor:
        return lm._shift_right(labels)

    def answer_prefix(self, config: Any) -> list[int]:
        return [config.decoder_start_token_id]

    def generation(self, config: Any, num_beams: int, max_length: int) -> GenerationConfig:
        """Return settings for plain greedy or beam search; T5's config sets nothing else."""
        tokens = config.decoder_start_token_id, config.eos_token_id, config.pad_token_id
        return plain_search(num_beams, max_length, *tokens)
