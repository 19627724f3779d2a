"""Parser for the original's command line (src/param.py of HenryHZY/VL-PET, NVlabs/DoRA and Ladder-Side-Tuning).

The names are the original's interface. Every flag belongs to exactly one table: it affects neither model nor recipe,
it is part of the recipe, it changes a supported model, or it is refused. A flag is refused, never silently ignored, if
it is broken in the original or belongs to another line of work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from vlpet_lightning.interop.original.side_network import layer_list


def _bool(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


HARMLESS_SWITCHES = """
    test_only submit from_scratch multiGPU fp16 distributed testing dry do_lower_case oscar_tags
    caption_only coco_only single_vqa_prefix no_prefix raw_label answer_normalize classifier test_answerable
    use_separate_optimizer_for_visual use_adam_for_visual use_data_augmentation infer_only use_store_gate_large
    freeze_ln_statistics freeze_bn_statistics use_vis_noise log_train_accuracy
    RefCOCO_GT RefCOCO_BUTD shuffle_boxes vis_pointer
""".split()

HARMLESS_VALUES = """
    train valid test train_topk valid_topk output load load_lxmert_qa run_name num_workers local_rank tokenizer
    image_size max_text_length optim gradient_accumulation_steps vis_lr vis_weight_decay adam_eps adam_beta1 adam_beta2
    losses n_ground wordMaskRate objMaskRate num_beams gen_max_length caption_cocoonly prefix prompt post_prompt
    feature_type ground_upsample ground_weight itm_cocoonly multitask_sampling comment deepspeed store_gate_path
    load_trained_model_path feat_dim max_n_boxes lambda_z phm_init_range project_name
    cls_task
""".split()

# flag: (type, the original's default); a type of None denotes a switch
RECIPE: dict[str, tuple[Any, Any]] = {
    "seed": (int, 9595),
    "lr": (float, 1e-4),
    "epochs": (int, 12),
    "batch_size": (int, 256),
    "valid_batch_size": (int, None),
    "warmup_ratio": (float, 0.05),
    "weight_decay": (float, 0.01),
    "clip_grad_norm": (float, -1.0),
    "dropout": (float, 0.1),
    "tasks": (str, ""),
    "use_tasks_prompts": (None, False),
}

MODEL: dict[str, tuple[Any, Any]] = {
    "backbone": (str, "t5-base"),
    "n_boxes": (int, 36),
    "downsample": (None, False),
    # adapters in every layer
    "use_adapter": (None, False),
    "use_compacter": (None, False),
    "use_lradapter": (None, False),
    "use_single_adapter": (None, False),
    "share_down_sampler": (None, False),
    "share_up_sampler": (None, False),
    "no_encoder_adapter": (None, False),
    "no_encoder_attn_adapter": (None, False),
    "no_decoder_adapter": (None, False),
    "add_adapter_cross_attn": (_bool, True),
    "reduction_factor": (int, 16),
    "use_adapter_down_dim": (None, False),
    "adapter_down_dim": (int, 96),
    "add_layer_norm_before_adapter": (None, False),
    "add_layer_norm_after_adapter": (None, False),
    "use_encoder_attn_adapter_scaling": (None, False),
    "encoder_attn_adapter_scaling_factor": (float, 1.0),
    "use_encoder_ff_adapter_scaling": (None, False),
    "encoder_ff_adapter_scaling_factor": (float, 1.0),
    "hypercomplex_division": (int, 4),
    "phm_rank": (int, 1),
    "shared_phm_rule": (_bool, True),
    "shared_phm_rule_over_tasks": (None, False),
    "factorized_phm": (_bool, True),
    "low_rank_rank": (int, 1),
    # hypernetworks
    "use_hyperformer": (None, False),
    "unique_hyper_net": (None, False),
    "efficient_unique_hyper_net": (None, False),
    "projected_task_embedding_dim": (int, -1),
    # LoRA, prompts
    "use_lora": (None, False),
    "lora_dim": (int, 4),
    "lora_alpha": (float, 32.0),
    "use_single_lora": (None, False),
    # DoRA (NVlabs/DoRA, image_video_text_understanding/VL-T5/src/param.py), beside --lora_dim
    "use_dora": (None, False),
    "lora_settings": (None, False),
    "dora_simple": (None, False),
    "encoder_prompt_len": (int, 0),
    "decoder_prompt_len": (int, 0),
    "mid_dim": (int, 768),
    "use_single_prompt": (None, False),
    # side networks (ylsung/Ladder-Side-Tuning, VL-T5/src/param.py)
    "use_side_transformers": (None, False),
    "side_reduction_factor": (int, 8),
    "encoder_side_layers": (layer_list, None),
    "decoder_side_layers": (layer_list, None),
    "load_side_pretrained_weights": (str, ""),
    "samples_for_fisher": (int, 1024),
    # VL-PET's encoder modules
    "use_encoder_adapter_down_multihead": (None, False),
    "use_encoder_adapter_up_multihead": (None, False),
    "use_encoder_adapter_down_up_multihead": (None, False),
    "use_encoder_adapter_down_up_pair_multihead": (None, False),
    "encoder_adapter_multihead_num_head": (int, 1),
    "use_encoder_adapter_gating_large_x": (None, False),
    "use_encoder_adapter_gating_large_x_lowrank": (None, False),
    "adapter_gating_down_dim": (int, 96),
    "use_encoder_adapter_gating_small_xy_cat": (None, False),
    "use_encoder_adapter_gating_middle_xy_add": (None, False),
    "use_encoder_adapter_gating_middle_ia3_add": (None, False),
    "use_encoder_adapter_gating_layernorm": (None, False),
    "use_encoder_adapter_gating_l2norm": (None, False),
    "use_encoder_adapter_gating_add": (None, False),
    "use_encoder_gating_large_x_lowrank": (None, False),
    "use_encoder_gating_large_x_lowrank_add_x2_deltay": (None, False),
    "gating_down_dim": (int, 96),
    "use_encoder_gating_scaling": (None, False),
    "encoder_gating_scaling_factor": (float, 1.0),
    "use_encoder_adapter_scaling": (None, False),
    "encoder_adapter_scaling_factor": (float, 1.0),
    "use_encoder_x2_scaling": (None, False),
    "encoder_x2_scaling_factor": (float, 1.0),
    # modules at single places in the decoder
    "use_decoder_enc_attn_value_parallel_adapter_down_dim": (None, False),
    "decoder_enc_attn_value_parallel_adapter_down_dim": (int, 96),
    "use_decoder_enc_attn_value_parallel_adapter_scaling": (None, False),
    "decoder_enc_attn_value_parallel_adapter_scaling_factor": (float, 1.0),
    "use_decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank": (None, False),
    "decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank_down_dim": (int, 96),
    "use_decoder_enc_attn_value_sequential_adapter_down_dim": (None, False),
    "decoder_enc_attn_value_sequential_adapter_down_dim": (int, 96),
    "use_decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank": (None, False),
    "decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank_down_dim": (int, 96),
    "use_decoder_enc_attn_value_residual_connection": (None, False),
    "use_decoder_enc_attn_value_ia3": (None, False),
    "use_decoder_enc_attn_value_ia3_add": (None, False),
    "use_decoder_enc_attn_value_ia3_one_init": (None, False),
    "use_decoder_ff_ia3": (None, False),
    "use_decoder_ff_ia3_add": (None, False),
    "use_decoder_ff_ia3_one_init": (None, False),
    "use_decoder_enc_attn_key_value_adapter_down_dim": (None, False),
    "decoder_enc_attn_key_value_adapter_down_dim": (int, 96),
    "use_decoder_enc_attn_adapter_down_dim": (None, False),
    "decoder_enc_attn_adapter_down_dim": (int, 96),
    "use_decoder_enc_attn_adapter_gating_large_x_lowrank": (None, False),
    "decoder_enc_attn_adapter_gating_large_x_lowrank_down_dim": (int, 96),
    "use_decoder_self_attn_adapter_down_dim": (None, False),
    "decoder_self_attn_adapter_down_dim": (int, 96),
    "use_decoder_ff_adapter_down_dim": (None, False),
    "decoder_ff_adapter_down_dim": (int, 96),
    "use_decoder_adapter_down_multihead": (None, False),
    "decoder_adapter_multihead_num_head": (int, 1),
    # the visual projection
    "use_lowrank_visual_projector": (None, False),
    "visual_projector_down_dim": (int, 96),
    "visual_projector_multihead_num_head": (int, 1),
    "use_visual_projector_gating_large_x_lowrank": (None, False),
    "visual_projector_gating_down_dim": (int, 96),
    "use_visual_projector_residual_connection": (None, False),
    # initialisation of modules
    "use_encoder_multihead_up_zero_init": (None, False),
    "use_encoder_gating_large_x_lowrank_up_zero_init": (None, False),
    "use_decoder_enc_vpa_up_zero_init": (None, False),
    "use_encoder_gating_small_up_zero_init": (None, False),
    "use_encoder_gating_middle_up_zero_init": (None, False),
    "use_encoder_gating_middle_ia3_one_init": (None, False),
    "use_encoder_gating_middle_ia3_zero_init": (None, False),
    # trained parameters
    "unfreeze_language_model": (None, False),
    "unfreeze_lm_head": (None, False),
    "unfreeze_layer_norms": (None, False),
    "unfreeze_encoder_layer_norms": (None, False),
    "unfreeze_decoder_layer_norms": (None, False),
    "unfreeze_decoder_input_layer_norms": (None, False),
    "unfreeze_decoder_self_attn_layer_norms": (None, False),
    "unfreeze_decoder_encoder_attn_layer_norms": (None, False),
    "unfreeze_decoder_ff_layer_norms": (None, False),
    "unfreeze_bias": (None, False),
    "unfreeze_encoder_bias": (None, False),
    "unfreeze_decoder_bias": (None, False),
    "freeze_vis_emb": (None, False),
}

DEAD = "it makes modules that are counted as trained and never called"
BROKEN: dict[str, str] = {  # switch of the original: its effect there
    "use_decoder_enc_attn_key_parallel_adapter_down_dim": "keys and values are reshaped inconsistently and scrambled",
    "use_decoder_enc_attn_value_parallel_adapter_down_multihead": "its result is assigned to a variable nobody reads",
    "use_decoder_enc_attn_value_parallel_adapter_down_up_pair_multihead": (
        "its result is assigned to a variable nobody reads"
    ),
    "use_encoder_attn_value_parallel_adapter_down_dim": DEAD,
    "use_encoder_attn_value_ia3": DEAD,
    "use_encoder_attn_value_ia3_add": DEAD,
    "use_encoder_attn_value_ia3_one_init": DEAD,
    "use_decoder_self_attn_value_parallel_adapter_down_dim": DEAD,
    "use_decoder_self_attn_value_ia3": DEAD,
    "use_decoder_self_attn_value_ia3_add": DEAD,
    "use_decoder_self_attn_value_ia3_one_init": DEAD,
    "use_attn_prefix": "nothing reads it",
    "use_lm_head_adapter": "it crashes",
}

REFUSED_SWITCHES = """
    share_vis_lang_layer_norm oneddownsample expand_vis_embedding vis_use_transformer unfreeze_vis_encoder
    unfreeze_vis_last_layer unfreeze_batch_norms vis_pooling_output use_vis_adapter sparse_sample remove_bn_vis_adapter
    track_z no_vis use_bitfit
""".split()

REFUSED_VALUES: dict[str, Any] = {  # refused unless they repeat the original's default
    "pos_dim": 4.0,
    "use_vision": True,
    "use_vis_order_embedding": True,
    "use_vis_layer_norm": True,
    "individual_vis_layer_norm": True,
    "additional_visual_embedding_layers": 0,
    "n_image_tokens": 4,
}

INERT_VALUES = """
    vis_adapter_type vis_reduction_factor decoder_enc_attn_key_parallel_adapter_down_dim
    encoder_attn_value_parallel_adapter_down_dim decoder_enc_attn_value_parallel_adapter_multihead_num_head
    decoder_self_attn_value_parallel_adapter_down_dim
""".split()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"cannot read the original's flags: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False)  # argparse, because the original's scripts abbreviate flags (`--feature`)
    for name in HARMLESS_SWITCHES + REFUSED_SWITCHES + list(BROKEN):
        parser.add_argument(f"--{name}", action="store_true")
    for name in HARMLESS_VALUES + INERT_VALUES:
        parser.add_argument(f"--{name}")
    for name, default in REFUSED_VALUES.items():
        parser.add_argument(f"--{name}", type=_bool if isinstance(default, bool) else type(default), default=default)
    for name, (kind, default) in (RECIPE | MODEL).items():
        if kind is None:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=kind, default=default)
    return parser


def parse_flags(flags: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of an original command line.

    Args:
        flags: Words of the command line, one string per word.

    Returns:
        A namespace with the entries of :data:`MODEL` and :data:`RECIPE`.

    Raises:
        ValueError: If a flag is unknown, broken in the original or not supported.
    """
    parsed, unknown = _parser().parse_known_args([str(flag) for flag in flags])
    if unknown:
        raise ValueError(f"unknown flags of the original: {' '.join(unknown)}")
    broken = [f"--{name} ({why})" for name, why in BROKEN.items() if getattr(parsed, name)]
    if broken:
        raise ValueError(
            f"flags that are broken in the original, so checkpoints trained with them are unusable: {', '.join(broken)}"
        )
    refused = [name for name in REFUSED_SWITCHES if getattr(parsed, name)]
    refused += [name for name, default in REFUSED_VALUES.items() if getattr(parsed, name) != default]
    if refused:
        raise ValueError(
            f"flags of the original that change the model in a way not supported here: {', '.join(refused)}"
        )
    return argparse.Namespace(**{name: getattr(parsed, name) for name in RECIPE | MODEL})
