"""Models of HenryHZY/VL-PET in ours: what its flags mean, and where its weights go."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.interop.flags import parse_flags
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import (
    VLPET,
    Gate,
    LargeGate,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    Placement,
    SmallGate,
)

VISUAL = "model.encoder.visual_embedding."
TIED = {  # other names of the token embedding
    "lm_head.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    VISUAL + "obj_order_embedding.weight",
}
TASK_COPIES = re.compile(r"\.adapters\.\w+\.")  # a single adapter is listed once a task

# pairs of (pattern of an original name, our name); applied in turn to a name that the TIED set does not hold
RENAMES = [
    (r"^model\.encoder\.visual_embedding\.feat_embedding\.", "visual.feature."),
    (r"^model\.encoder\.visual_embedding\.absolute_vis_pos_embedding\.", "visual.box."),
    (r"^model\.encoder\.visual_embedding\.img_order_embedding\.", "visual.image_order."),
    (r"\.attn_adapter_multihead_(down|up)\b", r".self_attn.out_proj.unit.\1"),
    (r"\.ff_adapter_multihead_(down|up)\b", r".fc2.unit.\1"),
    (r"\.encoder_attn_adapter_gating_large_x_(down|up)\b", r".self_attn.out_proj.unit.gate.\1"),
    (r"\.encoder_ff_adapter_gating_large_x_(down|up)\b", r".fc2.unit.gate.\1"),
    (r"\.encoder_attn_adapter_gating_(?:small_xy_cat|middle_xy_add)\b", ".self_attn.out_proj.unit.gate.score"),
    (r"\.encoder_ff_adapter_gating_(?:small_xy_cat|middle_xy_add)\b", ".fc2.unit.gate.score"),
    (r"\.encoder_attn_adapter_gating_middle_ia3_add$", ".self_attn.out_proj.unit.gate.vector"),
    (r"\.encoder_ff_adapter_gating_middle_ia3_add$", ".fc2.unit.gate.vector"),
    (r"\.attn_value_parallel_adapter\.adapters\.\w+\.(down|up)_sampler\b", r".v_proj.unit.\1"),
    (r"^(?!visual\.)", "lm."),
]
HEAD = re.compile(r"(\.unit\.down)\.(\d+)\.(weight|bias)$")


def _gate(args: argparse.Namespace) -> Callable[[int], Gate] | None:
    # the order in which the original looks at its flags (my_transformers/modeling_bart.py, encoder layer)
    if args.use_encoder_adapter_gating_large_x_lowrank:
        return partial(LargeGate, rank=args.adapter_gating_down_dim)
    if args.use_encoder_adapter_gating_small_xy_cat:
        return SmallGate
    if args.use_encoder_adapter_gating_middle_xy_add:
        return MiddleXGate
    return MiddleYGate if args.use_encoder_adapter_gating_middle_ia3_add else None


def _refuse(args: argparse.Namespace) -> None:
    gate = _gate(args) is not None
    problems = {
        "--use_adapter without --no_encoder_adapter": args.use_adapter and not args.no_encoder_adapter,
        "--use_adapter without --no_decoder_adapter": args.use_adapter and not args.no_decoder_adapter,
        "adapters of their own for each task (no --use_single_adapter)": (
            args.use_decoder_enc_attn_value_parallel_adapter_down_dim and not args.use_single_adapter
        ),
        "a gate without --use_encoder_adapter_down_multihead": gate and not args.use_encoder_adapter_down_multihead,
    }
    found = [name for name, is_so in problems.items() if is_so]
    if found:
        raise ValueError(f"flags of the original that change the model in a way not supported here: {'; '.join(found)}")


def placements_from_flags(args: argparse.Namespace) -> list[Placement]:
    """The placements that an original command line means.

    Raises:
        ValueError: If it means a model that we do not build.
    """
    _refuse(args)
    placements = []
    if args.use_encoder_adapter_down_multihead:
        encoder = partial(
            VLPET,
            rank=args.adapter_down_dim,
            heads=args.encoder_adapter_multihead_num_head,
            gate=_gate(args),
            scale=args.encoder_gating_scaling_factor if args.use_encoder_gating_scaling else 1.0,
        )
        placements.append(Placement(["encoder.attn", "encoder.ffn"], encoder))
    if args.use_decoder_enc_attn_value_parallel_adapter_down_dim:
        scaled = args.use_decoder_enc_attn_value_parallel_adapter_scaling
        value = partial(
            ParallelAdapter,
            rank=args.decoder_enc_attn_value_parallel_adapter_down_dim,
            scale=args.decoder_enc_attn_value_parallel_adapter_scaling_factor if scaled else 1.0,
        )
        placements.append(Placement(["decoder.cross.value"], value))
    return placements


def trainable_from_flags(args: argparse.Namespace) -> list[str]:
    """The ``trainable`` rules that an original command line means (src/trainer_base.py: unfreeze_parameters)."""
    pet = args.use_encoder_adapter_down_multihead or args.use_decoder_enc_attn_value_parallel_adapter_down_dim
    wanted = {
        "pet": pet,
        "visual_embedding": not args.freeze_vis_emb,
        "encoder.layer_norm": args.unfreeze_encoder_layer_norms or args.unfreeze_layer_norms,
        "decoder.layer_norm": args.unfreeze_decoder_layer_norms or args.unfreeze_layer_norms,
        "bias": args.unfreeze_bias,
    }
    return [rule for rule, is_wanted in wanted.items() if is_wanted]


def our_name(original: str) -> str | None:
    """Our name of an original parameter, with the head's number kept; None for another name of the token embedding."""
    if original in TIED:
        return None
    for pattern, ours in RENAMES:
        original = re.sub(pattern, ours, original)
    return original


def _plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel leaves."""
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def _check_copies(state_dict: Mapping[str, Tensor]) -> None:
    shared = state_dict["model.shared.weight"]
    unequal = [name for name in sorted(TIED & set(state_dict)) if not torch.equal(state_dict[name], shared)]
    if unequal:
        raise ValueError(f"not tied to model.shared.weight in this state dict: {unequal}")
    first: dict[str, str] = {}
    for name in sorted(state_dict):
        if TASK_COPIES.search(name):
            twin = first.setdefault(TASK_COPIES.sub(".adapters.*.", name), name)
            if not torch.equal(state_dict[name], state_dict[twin]):
                raise ValueError(
                    f"adapters differ from task to task: {name} is not {twin}; one shared adapter is expected"
                )


def _translate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; the heads of a multi-head down projection stacked into its one linear layer."""
    found: dict[str, Tensor] = {}
    heads: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state_dict.items():
        ours = our_name(name)
        if ours is None:
            continue
        head = HEAD.search(ours)
        if head:
            whole = ours[: head.start()] + f"{head[1]}.{head[3]}"
            heads.setdefault(whole, {})[int(head[2])] = tensor
        else:
            found[ours] = tensor
    for whole, parts in heads.items():
        found[whole] = torch.cat([parts[number] for number in sorted(parts)])
    return found


def _load(model: VLModel, tensors: dict[str, Tensor]) -> None:
    tied = {"lm.lm_head.weight", "lm.model.encoder.embed_tokens.weight", "lm.model.decoder.embed_tokens.weight"}
    own = model.state_dict()
    missing = sorted(set(own) - set(tensors) - tied)
    unknown = sorted(set(tensors) - set(own))
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} here, {tuple(own[name].shape)} in the model that the flags mean"
        for name in sorted(set(own) & set(tensors))
        if own[name].shape != tensors[name].shape
    ]
    problems = [f"missing: {missing}"] * bool(missing) + [f"not of this model: {unknown}"] * bool(unknown) + shapes
    if problems:
        raise ValueError("the state dict does not fit the model that the flags mean: " + "; ".join(problems))
    model.load_state_dict(tensors, strict=False)


def model_from_original(
    state_dict: Mapping[str, Tensor], flags: Sequence[str], backbone_config: PretrainedConfig
) -> VLModel:
    """Build the model that an original command line means and fill it with an original checkpoint.

    Args:
        state_dict: All parameters and buffers by the original's names, with or without ``module.`` prefixes.
        flags: The original's command-line flags, one string a word.
        backbone_config: The language model's configuration; its vocabulary size is taken from the weights.

    Returns:
        The model in evaluation mode, trainable parameters as the flags say.

    Raises:
        ValueError: For flags that are unknown or mean a model we do not build, and for weights that do not fit it.
    """
    args = parse_flags(flags)
    kind = backbone_config.model_type
    if kind not in BACKBONES:
        raise ValueError(f"no backbone {kind!r}: choose from {', '.join(sorted(BACKBONES))}")
    state_dict = _plain(state_dict)
    needed = (VISUAL + "feat_embedding.0.weight", "model.shared.weight")
    lacking = [name for name in needed if name not in state_dict]
    if lacking:
        raise ValueError(f"not a state dict of the original's BART: it lacks {' and '.join(lacking)}")
    weight = state_dict[needed[0]]
    _check_copies(state_dict)
    config = type(backbone_config).from_dict(backbone_config.to_dict())  # the caller's stays as it is
    config.vocab_size = state_dict["model.shared.weight"].shape[0]
    backbone = BACKBONES[kind]
    model = VLModel(
        backbone,
        backbone.build(config),
        feature_dim=weight.shape[1],
        grid=math.isqrt(args.n_boxes) if args.downsample else None,
        placements=placements_from_flags(args),
        trainable=trainable_from_flags(args),
    )
    _load(model, _translate(state_dict))
    return model.eval()


def original_tensors(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of ours (weights or gradients) under the original's names.

    Args:
        names: Original names, e.g. the keys of an original state dict.
        tensors: By our names.

    Yields:
        ``(original name, tensor)`` for every name that ``tensors`` holds; a head's rows for a multi-head projection.
    """
    count: dict[str, int] = {}
    places = {name: our_name(name) for name in names}
    for ours in places.values():
        head = ours and HEAD.search(ours)
        if ours and head:
            stem = ours[: head.start()]
            count[stem] = max(count.get(stem, 0), int(head[2]) + 1)
    for name, ours in places.items():
        if ours is None:
            continue
        head = HEAD.search(ours)
        if head is None:
            if ours in tensors:
                yield name, tensors[ours]
            continue
        stem = ours[: head.start()]
        whole = f"{stem}{head[1]}.{head[3]}"
        if whole in tensors:
            yield name, tensors[whole].chunk(count[stem])[int(head[2])]
