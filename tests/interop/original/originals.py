"""State dicts with the original implementation's names, written out from its source.

All values are zeros that take no memory, because only names and shapes are tested, also at full size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
TASKS = ("vqa", "gqa", "nlvr", "caption")


@dataclass(frozen=True)
class Sizes:
    """Shapes of a backbone with the benchmark's added vocabulary."""

    kind: str
    d: int
    ffn: int
    layers: int
    vocabulary: int
    positions: int = 0
    features: int = 2048
    heads: int = 12


BART_BASE = Sizes("bart", 768, 3072, 6, 50465, positions=1026)
T5_BASE = Sizes("t5", 768, 3072, 12, 32200)


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, d: int) -> Shapes:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def visual(root: str, s: Sizes) -> Shapes:
    bias = s.kind == "bart"
    found = linear(f"{root}feat_embedding.0", s.features, s.d) | linear(f"{root}absolute_vis_pos_embedding.0", 5, s.d)
    for name in ("feat_embedding.1", "absolute_vis_pos_embedding.1"):
        found |= norm(f"{root}{name}", s.d) if bias else {f"{root}{name}.weight": (s.d,)}
    found[f"{root}img_order_embedding.weight"] = (2, s.d)
    found[f"{root}obj_order_embedding.weight"] = (s.vocabulary, s.d)
    return found


def bart(s: Sizes) -> Shapes:
    found: Shapes = {"final_logits_bias": (1, s.vocabulary), "lm_head.weight": (s.vocabulary, s.d)}
    found["model.shared.weight"] = (s.vocabulary, s.d)
    for stack in ("encoder", "decoder"):
        root = f"model.{stack}."
        found[f"{root}embed_tokens.weight"] = (s.vocabulary, s.d)
        found[f"{root}embed_positions.weight"] = (s.positions, s.d)
        found |= norm(f"{root}layernorm_embedding", s.d)
        for layer in range(s.layers):
            at = f"{root}layers.{layer}."
            for attention in ("self_attn", *["encoder_attn"] * (stack == "decoder")):
                for part in "qkv":
                    found |= linear(f"{at}{attention}.{part}_proj", s.d, s.d)
                found |= linear(f"{at}{attention}.out_proj", s.d, s.d) | norm(f"{at}{attention}_layer_norm", s.d)
            found |= (
                linear(f"{at}fc1", s.d, s.ffn) | linear(f"{at}fc2", s.ffn, s.d) | norm(f"{at}final_layer_norm", s.d)
            )
    return found | visual("model.encoder.visual_embedding.", s)


def t5(s: Sizes) -> Shapes:
    found: Shapes = dict.fromkeys(("shared.weight", "lm_head.weight"), (s.vocabulary, s.d))
    for stack in ("encoder", "decoder"):
        found[f"{stack}.embed_tokens.weight"] = (s.vocabulary, s.d)
        found[f"{stack}.final_layer_norm.weight"] = (s.d,)
        found[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, s.heads)
        for layer in range(s.layers):
            at = f"{stack}.block.{layer}.layer."
            names = ("SelfAttention", *["EncDecAttention"] * (stack == "decoder"))
            for index, attention in enumerate(names):
                for part in "qkvo":
                    found |= linear(f"{at}{index}.{attention}.{part}", s.d, s.d, bias=False)
                found[f"{at}{index}.layer_norm.weight"] = (s.d,)
            last = len(names)
            found |= linear(f"{at}{last}.DenseReluDense.wi", s.d, s.ffn, bias=False)
            found |= linear(f"{at}{last}.DenseReluDense.wo", s.ffn, s.d, bias=False)
            found[f"{at}{last}.layer_norm.weight"] = (s.d,)
    return found | visual("encoder.visual_embedding.", s)


def backbone(s: Sizes) -> Shapes:
    return bart(s) if s.kind == "bart" else t5(s)


# places ---------------------------------------------------------------------------------------------------------------


def layers(s: Sizes, stack: str) -> Iterator[str]:
    for index in range(s.layers):
        yield f"model.{stack}.layers.{index}." if s.kind == "bart" else f"{stack}.block.{index}.layer."


def encoder_modules(s: Sizes, what: str) -> Iterator[str]:
    """Names of the modules after both sublayers of every encoder layer; ``{}`` in ``what`` is attn and ff."""
    for at in layers(s, "encoder"):
        for index, place in enumerate(("attn", "ff")):
            yield f"{at}{'' if s.kind == 'bart' else f'{index}.'}{what.format(place)}"


def decoder_modules(s: Sizes) -> Iterator[str]:
    """Names of the standard adapters of every decoder layer."""
    names = ("self_attn", "enc_attn", "ff") if s.kind == "bart" else ("0.attn", "1.enc_attn", "2.ff")
    for at in layers(s, "decoder"):
        yield from (f"{at}{name}_adapter" for name in names)


def values(s: Sizes) -> Iterator[str]:
    """Names of the cross-attention of every decoder layer."""
    for at in layers(s, "decoder"):
        yield f"{at}encoder_attn" if s.kind == "bart" else f"{at}1.EncDecAttention"


# methods --------------------------------------------------------------------------------------------------------------


def adapter(name: str, d: int, r: int, tasks: Sequence[str] = TASKS) -> Shapes:
    found: Shapes = {}
    for task in tasks:
        found |= linear(f"{name}.adapters.{task}.down_sampler", d, r)
        found |= linear(f"{name}.adapters.{task}.up_sampler", r, d)
    return found


def phm_adapter(name: str, d: int, r: int, n: int) -> Shapes:
    found: Shapes = {}
    for task in TASKS:
        for side, inputs, outputs in (("down", d, r), ("up", r, d)):
            at = f"{name}.adapters.{task}.{side}_sampler."
            found |= {f"{at}phm_rule": (n, n, n), f"{at}W": (n, inputs // n, outputs // n), f"{at}b": (outputs,)}
    return found


def multihead(name: str, d: int, r: int, heads: int, split: str = "down") -> Shapes:
    found: Shapes = {}
    downs = heads if split != "up" else 0
    ups = heads if split != "down" else 0
    for index in range(downs):
        found |= linear(f"{name}_down.{index}", d, r // heads)
    for index in range(ups):
        found |= linear(f"{name}_up.{index}", r // heads if split == "pairs" else r, d // heads)
    return found | ({} if downs else linear(f"{name}_down", d, r)) | ({} if ups else linear(f"{name}_up", r, d))


def gate(name: str, d: int, kind: str, r: int) -> Shapes:
    """Shapes of a gate; ``name`` ends in ``gating``."""
    return {
        "large": linear(f"{name}_large_x_down", d, r) | linear(f"{name}_large_x_up", r, d),
        "full": linear(f"{name}_large_x", d, d),
        "middle_x": linear(f"{name}_middle_xy_add", d, 1),
        "middle_y": {f"{name}_middle_ia3_add": (d,)},
        "small": linear(f"{name}_small_xy_cat", 2 * d, 1),
        "layernorm": norm(f"{name}_layernorm", d),
    }[kind]


def vlpet(s: Sizes, kind: str, r: int, heads: int = 4, split: str = "down", value_rank: int = 96) -> Shapes:
    """VL-PET as in its scripts."""
    found: Shapes = {}
    for name in encoder_modules(s, "{}_adapter_multihead"):
        found |= multihead(name, s.d, r, heads, split)
    for name in encoder_modules(s, "encoder_{}_adapter_gating"):
        found |= gate(name, s.d, kind, r)
    for name in values(s):
        found |= adapter(f"{name}.attn_value_parallel_adapter", s.d, value_rank)
    return found


def vl_adapter(s: Sizes, r: int) -> Shapes:
    found: Shapes = {}
    for name in (*encoder_modules(s, "{}_adapter"), *decoder_modules(s)):
        found |= adapter(name, s.d, r)
    return found


def compacter(s: Sizes, r: int, n: int) -> Shapes:
    found: Shapes = {}
    for name in (*encoder_modules(s, "{}_adapter"), *decoder_modules(s)):
        found |= phm_adapter(name, s.d, r, n)
    return found


def lora(s: Sizes, r: int) -> Shapes:
    found: Shapes = {}
    attentions = [f"{at}self_attn" for stack in ("encoder", "decoder") for at in layers(s, stack)]
    for name in [*attentions, *values(s)]:
        for part in "qv":
            for task in TASKS:
                found[f"{name}.{part}_proj.lora_As.{task}"] = (r, s.d)
                found[f"{name}.{part}_proj.lora_Bs.{task}"] = (s.d, r)
    return found


def prompt(s: Sizes, stack: str, length: int, hidden: int) -> Shapes:
    root = ("model." if s.kind == "bart" else "") + ("encoder." if stack == "encoder" else "")
    found: Shapes = {}
    for task in TASKS:
        at = f"{root}prompt_modules.prompts.{task}.prefix_embedding"
        found[f"{at}.0.weight"] = (length, s.d)
        found |= linear(f"{at}.1", s.d, hidden) | linear(f"{at}.3", hidden, s.d)
    return found


def hyperformer(s: Sizes, r: int, embedding: int, hidden: int, projected: int, one: bool) -> Shapes:
    root = "model." if s.kind == "bart" else ""
    found: Shapes = {}
    for owner in ("shared_task_embed", "encoder.task_embed", "decoder.task_embed"):
        found |= {f"{root}{owner}.task_to_embeddings.{task}": (embedding,) for task in TASKS}
    for stack in ("encoder", "decoder"):
        at = f"{root}{stack}.adapter_layers_hyper_net."
        found[f"{at}layer_id_embeddings.weight"] = (s.layers, embedding)
        if one:
            found[f"{at}adapters_block_type.weight"] = (3, embedding)
        found |= linear(f"{at}task_hypernet.task_embeding_generator.0", (3 if one else 2) * embedding, hidden)
        found |= linear(f"{at}task_hypernet.task_embeding_generator.2", hidden, projected)
        found |= norm(f"{at}LayerNorm", projected)
        blocks = ["feed_forward_", "self_attention_"] + ["cross_attention_"] * (stack == "decoder")
        for block in [""] if one else blocks:
            for side, outputs, inputs in (("down", r, s.d), ("up", s.d, r)):
                net = f"{at}{block}{side}_sampler_hyper_net."
                found |= linear(f"{net}weight_generator.0", projected, outputs * inputs)
                found |= linear(f"{net}bias_generator.0", projected, outputs)
    return found


def zeros(shapes: Shapes) -> dict[str, Tensor]:
    """Build a state dict of these shapes that takes no memory."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
