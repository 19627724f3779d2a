"""Trained parameters of an original command line (src/trainer_base.py: unfreeze_parameters)."""

from __future__ import annotations

import argparse

# flags that create a plain adapter configuration regardless of all other flags (src/trainer_base.py)
VALUE_LIKE = (
    "use_decoder_enc_attn_value_parallel_adapter_down_dim",
    "use_decoder_enc_attn_key_value_adapter_down_dim",
    "use_decoder_enc_attn_value_sequential_adapter_down_dim",
)
MAKE_MODULES = (  # flags that create modules with their own parameters
    *VALUE_LIKE,
    "use_encoder_adapter_down_multihead",
    "use_encoder_adapter_up_multihead",
    "use_encoder_adapter_down_up_multihead",
    "use_encoder_adapter_down_up_pair_multihead",
    "use_encoder_adapter_gating_large_x",
    "use_encoder_adapter_gating_large_x_lowrank",
    "use_encoder_adapter_gating_small_xy_cat",
    "use_encoder_adapter_gating_middle_xy_add",
    "use_encoder_adapter_gating_middle_ia3_add",
    "use_encoder_adapter_gating_layernorm",
    "use_encoder_gating_large_x_lowrank",
    "use_decoder_enc_attn_value_ia3",
    "use_decoder_ff_ia3",
    "use_decoder_enc_attn_adapter_down_dim",
    "use_decoder_self_attn_adapter_down_dim",
    "use_decoder_ff_adapter_down_dim",
    "use_decoder_adapter_down_multihead",
)


def trainable_from_flags(args: argparse.Namespace, kind: str) -> list[str]:
    """Translate a command line into ``trainable`` rules (src/trainer_base.py: unfreeze_parameters).

    In the original, ``--unfreeze_layer_norms`` does not match the class of T5's norms, so it trains no norms there.
    """
    bart = kind == "bart"
    everywhere = args.unfreeze_layer_norms and bart
    wanted = {
        "pet": _has_pet(args, bart),
        "visual_embedding": not args.freeze_vis_emb,
        "language_model": args.unfreeze_language_model,
        "token_embedding": args.unfreeze_lm_head,
        "encoder.layer_norm": args.unfreeze_encoder_layer_norms or everywhere,
        "decoder.layer_norm": args.unfreeze_decoder_layer_norms or everywhere,
        "decoder.layer_norm.embedding": args.unfreeze_decoder_input_layer_norms,
        "decoder.layer_norm.attn": args.unfreeze_decoder_self_attn_layer_norms,
        "decoder.layer_norm.cross": args.unfreeze_decoder_encoder_attn_layer_norms,
        "decoder.layer_norm.ffn": args.unfreeze_decoder_ff_layer_norms,
        "bias": args.unfreeze_bias or args.use_lora,
        "encoder.bias": args.unfreeze_encoder_bias,
        "decoder.bias": args.unfreeze_decoder_bias,
    }
    return [rule for rule, is_wanted in wanted.items() if is_wanted]


def _has_pet(args: argparse.Namespace, bart: bool) -> bool:
    """Check whether the command line creates modules with their own parameters."""
    adapters = args.use_adapter or args.use_compacter or args.use_lradapter
    switches = (
        adapters and not (args.no_encoder_adapter and args.no_decoder_adapter),
        args.use_hyperformer,
        args.use_lora and bart,
        args.use_dora and args.lora_settings,
        args.use_side_transformers,
        args.encoder_prompt_len > 0,
        args.decoder_prompt_len > 0,
        *(getattr(args, name) for name in MAKE_MODULES if not (args.use_lora and bart and "enc_attn_value" in name)),
    )
    return any(switches)
