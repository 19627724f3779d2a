"""Translation of original command lines to units, placements and rules, and refused ones."""

from __future__ import annotations

import pytest

from vlpet_lightning.interop.original.flags import parse_flags
from vlpet_lightning.interop.original.methods import method_from_flags
from vlpet_lightning.interop.original.rules import trainable_from_flags
from vlpet_lightning.pet import VLPET, LargeGate, MiddleXGate, MiddleYGate, ParallelAdapter, SmallGate
from vlpet_lightning.pet.serialization import placements_from_plain

LARGE = "--use_encoder_adapter_gating_large_x_lowrank"
SMALL = "--use_encoder_adapter_gating_small_xy_cat"
MIDDLE_X = "--use_encoder_adapter_gating_middle_xy_add"
MIDDLE_Y = "--use_encoder_adapter_gating_middle_ia3_add"
ENCODER = ["--use_encoder_adapter_down_multihead", "--adapter_down_dim", "8"]
VALUE = ["--use_single_adapter", "--use_decoder_enc_attn_value_parallel_adapter_down_dim"]
TASKS = ["--tasks", "vqa,nlvr"]
WIDTH = 16


def read(words, kind="bart"):
    return method_from_flags(parse_flags(words), kind, WIDTH)


def plain(words, kind="bart"):
    """Return ``{site: (class, settings)}``, with nested nodes as class names."""

    def short(value):
        if isinstance(value, dict):
            return value["class_path"].rpartition(".")[2]
        return value

    return {
        site: (short(entry["unit"]), {k: short(v) for k, v in entry["unit"].get("init_args", {}).items()})
        for entry in read(words, kind).placements
        for site in entry["at"]
    }


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ([], type(None)),
        ([LARGE], LargeGate),
        ([SMALL], SmallGate),
        ([MIDDLE_X], MiddleXGate),
        ([MIDDLE_Y], MiddleYGate),
        ([MIDDLE_Y, MIDDLE_X, SMALL, LARGE], LargeGate),
        ([MIDDLE_Y, MIDDLE_X, SMALL], SmallGate),
        ([MIDDLE_Y, MIDDLE_X], MiddleXGate),
    ],
)
def test_of_several_gates_the_original_takes_the_first_it_looks_at(gates, expected):
    (place,) = placements_from_plain(read([*ENCODER, *gates]).placements)
    assert place.at == ["encoder.attn", "encoder.ffn"]
    assert type(place.unit(WIDTH).gate) is expected


def test_sizes_and_scales_of_the_flags_reach_the_units():
    words = [*ENCODER, LARGE, "--adapter_gating_down_dim", "6", "--encoder_adapter_multihead_num_head", "2"]
    words += [*VALUE, "--decoder_enc_attn_value_parallel_adapter_down_dim", "10"]
    factors = ["--encoder_gating_scaling_factor", "0.3"]
    factors += ["--decoder_enc_attn_value_parallel_adapter_scaling_factor", "4"]
    switches = ["--use_encoder_gating_scaling", "--use_decoder_enc_attn_value_parallel_adapter_scaling"]

    def units(flags):
        return [place.unit(WIDTH) for place in placements_from_plain(read(flags).placements)]

    encoder, value = units(words + factors)
    assert (type(encoder), type(value)) == (VLPET, ParallelAdapter)
    assert (encoder.down.out_features, encoder.gate.down.out_features, encoder.heads) == (8, 6, 2)
    assert value.down.out_features == 10
    assert (encoder.branch_scale, value.scale) == (1.0, 1.0)  # there, too, a factor has no effect without its switch
    encoder, value = units(words + factors + switches)
    assert (encoder.branch_scale, value.scale) == (0.3, 4.0)


EVERYWHERE = ("encoder.attn", "encoder.ffn", "decoder.attn", "decoder.cross", "decoder.ffn")
LORA_SITES = [f"{at}.{part}" for at in ("encoder.attn", "decoder.attn", "decoder.cross") for part in ("query", "value")]


def test_standard_adapters_stand_behind_every_sublayer():
    assert plain(["--use_adapter", "--reduction_factor", "4", "--use_single_adapter"]) == {
        site: ("Adapter", {"rank": 4}) for site in EVERYWHERE
    }
    without = plain(["--use_adapter", "--use_single_adapter", "--no_decoder_adapter"])
    assert set(without) == {"encoder.attn", "encoder.ffn"}
    without = plain(["--use_adapter", "--use_single_adapter", "--add_adapter_cross_attn", "False"])
    assert set(without) == set(EVERYWHERE) - {"decoder.cross"}
    without = plain(["--use_adapter", "--use_single_adapter", "--no_encoder_attn_adapter"])
    assert set(without) == set(EVERYWHERE) - {"encoder.attn"}


def test_adapters_of_their_own_for_each_task_may_share_a_half():
    found = plain(["--use_adapter", "--share_up_sampler", *TASKS])
    assert found["encoder.ffn"] == ("PerTask", {"unit": "Adapter", "tasks": ["vqa", "nlvr2"], "share": ["up"]})


def test_compacter_and_its_defaults():
    assert plain(["--use_compacter", "--use_single_adapter", "--reduction_factor", "2"])["encoder.attn"] == (
        "Compacter",
        {"rank": 8, "division": 4, "factor_rank": 1, "shared_rule": True},
    )


def test_a_compacter_beside_a_value_adapter_becomes_a_plain_adapter_and_is_noted():
    method = read(
        ["--use_compacter", "--no_decoder_adapter", "--adapter_down_dim", "8", "--use_adapter_down_dim", *VALUE]
    )
    assert [entry["unit"]["class_path"].rpartition(".")[2] for entry in method.placements] == [
        "Adapter",
        "ParallelAdapter",
    ]
    assert any("plain adapters" in note for note in method.notes)


def test_lora_goes_to_queries_and_values_and_swallows_the_value_adapter():
    words = ["--use_lora", "--lora_dim", "4", "--use_single_lora"]
    assert plain(words) == {site: ("LoRA", {"rank": 4, "alpha": 32.0}) for site in LORA_SITES}
    method = read([*words, *VALUE])
    assert [entry["at"] for entry in method.placements] == [LORA_SITES]
    assert any("does not read it" in note for note in method.notes)


def test_t5_has_no_lora_there():
    method = read(["--use_lora", "--use_single_lora"], "t5")
    assert method.placements == []
    assert method.trainable == ["visual_embedding", "bias"]
    assert any("T5 has no LoRA" in note for note in method.notes)


def test_fresh_weights_follow_the_backbone_and_the_zero_flags():
    zeros = ["--use_encoder_multihead_up_zero_init", "--use_decoder_enc_vpa_up_zero_init"]
    zeros += ["--use_encoder_gating_large_x_lowrank_up_zero_init"]

    def inits(words, kind):
        (encoder, value) = read(words, kind).placements
        nodes = (encoder["unit"], encoder["unit"]["init_args"]["gate"], value["unit"])
        return [node["init_args"].get("init", "normal") for node in nodes]

    words = [*ENCODER, LARGE, *VALUE]
    assert inits(words, "bart") == ["normal"] * 3
    assert inits(words, "t5") == ["uniform"] * 3
    assert inits([*words, *zeros], "bart") == ["normal+zero"] * 3
    assert inits([*words, *zeros], "t5") == ["uniform+zero"] * 3


def test_deltas_and_pretrained_outputs_can_be_scaled_apart():
    words = [*ENCODER, MIDDLE_X, "--use_encoder_adapter_scaling", "--encoder_adapter_scaling_factor", "4"]
    words += ["--use_encoder_x2_scaling", "--encoder_x2_scaling_factor", "0.5"]
    (entry,) = read(words, "t5").placements
    inside = entry["unit"]["init_args"]["unit"]["init_args"]
    assert entry["unit"]["class_path"].endswith("Gated")
    assert (inside["scale"], inside["pretrained_scale"]) == (4.0, 0.5)


def test_a_gate_may_stand_alone_and_may_be_added():
    assert plain([LARGE, "--use_encoder_adapter_gating_add"])["encoder.ffn"] == (
        "Gated",
        {"gate": "LargeGate", "combine": "add"},
    )


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (VALUE[1:], "bart", r"tasks are not named \(--tasks\)"),
        (["--use_adapter", "--use_compacter", "--use_single_adapter"], "bart", "more than one kind of adapters"),
        (["--use_adapter", "--use_single_adapter", *ENCODER], "bart", "leave them unused: add --no_encoder_adapter"),
        (["--use_hyperformer", *TASKS], "bart", "needs --unique_hyper_net or --efficient_unique_hyper_net"),
        (["--use_hyperformer", "--unique_hyper_net", LARGE, *TASKS], "bart", "around a hypernetwork's adapters"),
        (["--use_encoder_gating_large_x_lowrank", LARGE], "bart", "beside another encoder module"),
        (["--use_decoder_ff_ia3"], "t5", "--use_decoder_ff_ia3 with T5, whose code does not read it"),
        (["--use_encoder_adapter_up_multihead"], "t5", "--use_encoder_adapter_up_multihead with T5"),
        ([*VALUE, "--use_decoder_enc_attn_value_ia3"], "bart", "several units on the cross-attention value"),
        (
            ["--use_decoder_ff_adapter_down_dim", "--use_decoder_adapter_down_multihead"],
            "bart",
            "the original leaves one unused",
        ),
    ],
)
def test_combinations_that_are_broken_or_mean_nothing_are_refused(words, kind, message):
    words = words if "--use_single_adapter" in words or "--tasks" in words or words == VALUE[1:] else [*words, *TASKS]
    with pytest.raises(ValueError, match=message):
        read(words, kind)


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ([], ["visual_embedding"]),
        (["--freeze_vis_emb"], []),
        (ENCODER, ["pet", "visual_embedding"]),
        (VALUE, ["pet", "visual_embedding"]),
        (["--encoder_prompt_len", "4"], ["pet", "visual_embedding"]),
        (["--use_lora"], ["pet", "visual_embedding", "bias"]),
        (["--unfreeze_encoder_layer_norms"], ["visual_embedding", "encoder.layer_norm"]),
        (["--unfreeze_decoder_layer_norms"], ["visual_embedding", "decoder.layer_norm"]),
        (["--unfreeze_layer_norms"], ["visual_embedding", "encoder.layer_norm", "decoder.layer_norm"]),
        (["--unfreeze_decoder_ff_layer_norms"], ["visual_embedding", "decoder.layer_norm.ffn"]),
        (["--unfreeze_bias"], ["visual_embedding", "bias"]),
        (["--unfreeze_decoder_bias"], ["visual_embedding", "decoder.bias"]),
        (["--unfreeze_language_model"], ["visual_embedding", "language_model"]),
        (["--unfreeze_lm_head"], ["visual_embedding", "token_embedding"]),
    ],
)
def test_flags_say_what_is_trained(words, rules):
    assert trainable_from_flags(parse_flags(words), "bart") == rules


def test_t5_trains_no_norm_with_the_flag_for_all_of_them():
    args = parse_flags(["--unfreeze_layer_norms"])
    assert trainable_from_flags(args, "t5") == ["visual_embedding"]
