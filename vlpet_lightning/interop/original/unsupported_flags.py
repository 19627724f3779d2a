"""Detection of original command lines that are contradictory or not supported; each is an error, never a guess."""

from __future__ import annotations

import argparse

from vlpet_lightning.interop.original.nodes import Nodes, tasks_of
from vlpet_lightning.interop.original.rules import VALUE_LIKE
from vlpet_lightning.interop.original.side_network import side_network_problems

# flags ignored by the original's code for T5
BART_ONLY = (
    "use_encoder_attn_adapter_scaling",
    "use_encoder_ff_adapter_scaling",
    "no_encoder_attn_adapter",
    "use_encoder_adapter_up_multihead",
    "use_encoder_adapter_down_up_multihead",
    "use_encoder_adapter_down_up_pair_multihead",
    "use_encoder_adapter_gating_large_x",
    "use_encoder_adapter_gating_layernorm",
    "use_encoder_adapter_gating_l2norm",
    "use_encoder_adapter_gating_add",
    "use_encoder_gating_large_x_lowrank",
    "use_encoder_gating_large_x_lowrank_add_x2_deltay",
    "use_decoder_enc_attn_value_parallel_adapter_scaling",
    "use_decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank",
    "use_decoder_enc_attn_value_sequential_adapter_down_dim",
    "use_decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank",
    "use_decoder_enc_attn_value_residual_connection",
    "use_decoder_enc_attn_value_ia3",
    "use_decoder_ff_ia3",
    "use_decoder_enc_attn_key_value_adapter_down_dim",
    "use_decoder_enc_attn_adapter_down_dim",
    "use_decoder_enc_attn_adapter_gating_large_x_lowrank",
    "use_decoder_self_attn_adapter_down_dim",
    "use_decoder_ff_adapter_down_dim",
    "use_decoder_adapter_down_multihead",
    "use_lowrank_visual_projector",
    "unfreeze_decoder_input_layer_norms",
    "unfreeze_decoder_self_attn_layer_norms",
    "unfreeze_decoder_encoder_attn_layer_norms",
    "unfreeze_decoder_ff_layer_norms",
)


def check_buildable(args: argparse.Namespace, kind: str, nodes: Nodes) -> None:
    """Check that a command line describes a single, supported model.

    Args:
        args: Result of :func:`vlpet_lightning.interop.original.flags.parse_flags`.
        kind: ``bart`` or ``t5``.
        nodes: Node factory of the same command line.

    Raises:
        ValueError: If it does not; the message names every reason.
    """
    families = ("use_adapter", "use_compacter", "use_lradapter", "use_hyperformer")
    chosen = [name for name in families if getattr(args, name)]
    multihead = nodes.split() is not None
    standard = bool(chosen) and "use_hyperformer" not in chosen
    problems = {
        f"more than one kind of adapters: {', '.join(chosen)}": len(chosen) > 1,
        "multi-head encoder modules beside standard ones, which leave them unused: add --no_encoder_adapter": (
            multihead and standard and not args.no_encoder_adapter
        ),
        "gates or layer norms around a hypernetwork's adapters": (
            args.use_hyperformer
            and (nodes.gate() is not None or args.add_layer_norm_before_adapter or args.add_layer_norm_after_adapter)
        ),
        "--use_hyperformer needs --unique_hyper_net or --efficient_unique_hyper_net, not both": (
            args.use_hyperformer and args.unique_hyper_net == args.efficient_unique_hyper_net
        ),
        "--use_encoder_gating_large_x_lowrank beside another encoder module": (
            args.use_encoder_gating_large_x_lowrank and (multihead or nodes.gate() is not None or nodes.standard(True))
        ),
        "--no_encoder_attn_adapter beside a gate or multi-head module": (
            args.no_encoder_attn_adapter and (multihead or nodes.gate() is not None)
        ),
        "--use_dora beside --use_lora": args.use_dora and args.use_lora,
        "--use_dora without --unfreeze_bias, which trains the biases of the adapted layers alone": (
            args.use_dora and args.lora_settings and not args.unfreeze_bias
        ),
        "tasks are not named (--tasks), but modules of their own are wanted": (
            not tasks_of(args) and _needs_tasks(args, kind, nodes)
        ),
    }
    found = [name for name, is_so in problems.items() if is_so]
    if args.use_dora and kind != "bart":
        found.append("--use_dora with T5, whose layers it does not name")
    found += side_network_problems(args, kind, nodes.width)
    if kind != "bart":
        found += [f"--{name} with T5, whose code does not read it" for name in BART_ONLY if getattr(args, name)]
    if found:
        raise ValueError(f"flags of the original that change the model in a way not supported here: {'; '.join(found)}")


def _needs_tasks(args: argparse.Namespace, kind: str, nodes: Nodes) -> bool:
    """Check whether modules are created separately for each task."""
    controllers = nodes.standard(True) or nodes.standard(False) or any(getattr(args, name) for name in VALUE_LIKE)
    prompts = args.encoder_prompt_len > 0 or args.decoder_prompt_len > 0
    return bool(
        (controllers and not args.use_single_adapter)
        or (args.use_lora and kind == "bart" and not args.use_single_lora)
        or (prompts and not args.use_single_prompt)
        or args.use_hyperformer
    )
