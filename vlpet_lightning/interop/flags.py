"""The original's command line (src/param.py of HenryHZY/VL-PET): which flags shape the model, and how we read them.

The names are the original's interface. A flag belongs to one of three tables: it does not touch the model, it shapes a
model that we build, or it shapes one that we do not build yet (an error, never silently ignored).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn


def _bool(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


HARMLESS_SWITCHES = """
    test_only submit from_scratch multiGPU fp16 distributed use_tasks_prompts testing dry do_lower_case oscar_tags
    caption_only coco_only single_vqa_prefix no_prefix raw_label answer_normalize classifier test_answerable
    use_separate_optimizer_for_visual use_adam_for_visual use_data_augmentation infer_only use_store_gate_large
    freeze_ln_statistics freeze_bn_statistics use_vis_noise use_encoder_multihead_up_zero_init
    use_encoder_gating_large_x_lowrank_up_zero_init use_decoder_enc_vpa_up_zero_init
    use_encoder_gating_small_up_zero_init use_encoder_gating_middle_up_zero_init
    use_encoder_gating_middle_ia3_one_init use_encoder_gating_middle_ia3_zero_init
""".split()

HARMLESS_VALUES = """
    seed train valid test train_topk valid_topk output load load_lxmert_qa run_name num_workers local_rank tokenizer
    image_size max_text_length batch_size valid_batch_size optim warmup_ratio weight_decay clip_grad_norm
    gradient_accumulation_steps lr vis_lr vis_weight_decay adam_eps adam_beta1 adam_beta2 epochs losses n_ground
    wordMaskRate objMaskRate num_beams gen_max_length caption_cocoonly prefix prompt post_prompt feature_type
    ground_upsample ground_weight itm_cocoonly multitask_sampling tasks comment deepspeed store_gate_path
    load_trained_model_path log_train_accuracy feat_dim max_n_boxes reduction_factor dropout lambda_z
""".split()

# flag: (type, the original's default); a type of None makes a switch
MODEL: dict[str, tuple[Any, Any]] = {
    "backbone": (str, "t5-base"),
    "n_boxes": (int, 36),
    "downsample": (None, False),
    "use_adapter": (None, False),
    "use_single_adapter": (None, False),
    "no_encoder_adapter": (None, False),
    "no_decoder_adapter": (None, False),
    "use_adapter_down_dim": (None, False),
    "adapter_down_dim": (int, 96),
    "use_encoder_adapter_down_multihead": (None, False),
    "encoder_adapter_multihead_num_head": (int, 1),
    "use_encoder_adapter_gating_large_x_lowrank": (None, False),
    "adapter_gating_down_dim": (int, 96),
    "use_encoder_adapter_gating_small_xy_cat": (None, False),
    "use_encoder_adapter_gating_middle_xy_add": (None, False),
    "use_encoder_adapter_gating_middle_ia3_add": (None, False),
    "use_encoder_gating_scaling": (None, False),
    "encoder_gating_scaling_factor": (float, 1.0),
    "use_decoder_enc_attn_value_parallel_adapter_down_dim": (None, False),
    "decoder_enc_attn_value_parallel_adapter_down_dim": (int, 96),
    "use_decoder_enc_attn_value_parallel_adapter_scaling": (None, False),
    "decoder_enc_attn_value_parallel_adapter_scaling_factor": (float, 1.0),
    "unfreeze_encoder_layer_norms": (None, False),
    "unfreeze_decoder_layer_norms": (None, False),
    "unfreeze_layer_norms": (None, False),
    "unfreeze_bias": (None, False),
    "freeze_vis_emb": (None, False),
}

REFUSED_SWITCHES = """
    share_vis_lang_layer_norm oneddownsample expand_vis_embedding vis_use_transformer use_single_prompt
    use_attn_prefix use_hyperformer use_compacter use_lradapter efficient_unique_hyper_net unique_hyper_net
    unfreeze_vis_encoder unfreeze_vis_last_layer unfreeze_batch_norms share_down_sampler share_up_sampler
    shared_phm_rule_over_tasks vis_pooling_output use_vis_adapter add_layer_norm_before_adapter
    add_layer_norm_after_adapter sparse_sample remove_bn_vis_adapter unfreeze_lm_head use_lm_head_adapter use_lora
    use_single_lora track_z unfreeze_language_model unfreeze_decoder_input_layer_norms
    unfreeze_decoder_self_attn_layer_norms unfreeze_decoder_encoder_attn_layer_norms unfreeze_decoder_ff_layer_norms
    unfreeze_encoder_bias unfreeze_decoder_bias use_encoder_adapter_gating_large_x
    use_encoder_gating_large_x_lowrank use_encoder_gating_large_x_lowrank_add_x2_deltay
    use_decoder_enc_attn_key_parallel_adapter_down_dim use_decoder_enc_attn_key_value_adapter_down_dim
    use_decoder_enc_attn_adapter_down_dim use_decoder_enc_attn_adapter_gating_large_x_lowrank
    use_encoder_adapter_gating_layernorm use_encoder_adapter_gating_l2norm use_encoder_adapter_gating_add
    use_decoder_enc_attn_value_sequential_adapter_down_dim use_decoder_enc_attn_value_residual_connection
    use_decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank
    use_decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank use_decoder_enc_attn_value_ia3
    use_decoder_enc_attn_value_ia3_add use_decoder_enc_attn_value_ia3_one_init use_decoder_self_attn_value_ia3
    use_decoder_self_attn_value_ia3_add use_decoder_self_attn_value_ia3_one_init use_decoder_ff_ia3
    use_decoder_ff_ia3_add use_decoder_ff_ia3_one_init no_encoder_attn_adapter
    use_encoder_attn_value_parallel_adapter_down_dim use_encoder_attn_value_ia3 use_encoder_attn_value_ia3_add
    use_encoder_attn_value_ia3_one_init use_encoder_attn_adapter_scaling use_encoder_ff_adapter_scaling
    use_encoder_adapter_up_multihead use_encoder_adapter_down_up_multihead
    use_encoder_adapter_down_up_pair_multihead use_decoder_adapter_down_multihead
    use_decoder_enc_attn_value_parallel_adapter_down_multihead
    use_decoder_enc_attn_value_parallel_adapter_down_up_pair_multihead
    use_decoder_self_attn_value_parallel_adapter_down_dim use_decoder_self_attn_adapter_down_dim
    use_decoder_ff_adapter_down_dim use_encoder_adapter_scaling use_encoder_x2_scaling no_vis
    use_lowrank_visual_projector use_visual_projector_gating_large_x_lowrank
    use_visual_projector_residual_connection
""".split()

REFUSED_VALUES: dict[str, Any] = {  # refused unless they repeat the original's default
    "pos_dim": 4.0,
    "use_vision": True,
    "use_vis_order_embedding": True,
    "use_vis_layer_norm": True,
    "individual_vis_layer_norm": True,
    "additional_visual_embedding_layers": 0,
    "n_image_tokens": 4,
    "encoder_prompt_len": 0,
    "decoder_prompt_len": 0,
}

INERT_VALUES = """
    mid_dim projected_task_embedding_dim hypercomplex_division phm_rank shared_phm_rule factorized_phm
    add_adapter_cross_attn low_rank_rank phm_init_range vis_adapter_type vis_reduction_factor lora_dim lora_alpha
    gating_down_dim decoder_enc_attn_key_parallel_adapter_down_dim decoder_enc_attn_key_value_adapter_down_dim
    decoder_enc_attn_adapter_down_dim decoder_enc_attn_adapter_gating_large_x_lowrank_down_dim
    decoder_enc_attn_value_sequential_adapter_down_dim
    decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank_down_dim
    decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank_down_dim
    encoder_attn_value_parallel_adapter_down_dim encoder_attn_adapter_scaling_factor
    encoder_ff_adapter_scaling_factor decoder_adapter_multihead_num_head
    decoder_enc_attn_value_parallel_adapter_multihead_num_head decoder_self_attn_value_parallel_adapter_down_dim
    decoder_self_attn_adapter_down_dim decoder_ff_adapter_down_dim encoder_adapter_scaling_factor
    encoder_x2_scaling_factor visual_projector_down_dim visual_projector_multihead_num_head
    visual_projector_gating_down_dim
""".split()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"cannot read the original's flags: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False)  # argparse because the original's scripts abbreviate (`--feature`)
    for name in HARMLESS_SWITCHES + REFUSED_SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    for name in HARMLESS_VALUES + INERT_VALUES:
        parser.add_argument(f"--{name}")
    for name, default in REFUSED_VALUES.items():
        parser.add_argument(f"--{name}", type=_bool if isinstance(default, bool) else type(default), default=default)
    for name, (kind, default) in MODEL.items():
        if kind is None:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=kind, default=default)
    return parser


def parse_flags(flags: Sequence[str]) -> argparse.Namespace:
    """Read the flags of an original command line.

    Args:
        flags: As they stood on the command line, one string a word.

    Returns:
        A namespace with the entries of :data:`MODEL`.

    Raises:
        ValueError: For an unknown flag, or one that shapes a model which we do not build.
    """
    parsed, unknown = _parser().parse_known_args([str(flag) for flag in flags])
    if unknown:
        raise ValueError(f"unknown flags of the original: {' '.join(unknown)}")
    refused = [name for name in REFUSED_SWITCHES if getattr(parsed, name)]
    refused += [name for name, default in REFUSED_VALUES.items() if getattr(parsed, name) != default]
    if refused:
        raise ValueError(
            f"flags of the original that change the model in a way not supported here: {', '.join(refused)}"
        )
    return argparse.Namespace(**{name: getattr(parsed, name) for name in MODEL})
