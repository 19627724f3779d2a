"""The original's command line: what is understood, what it means, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest

from vlpet_lightning.interop import flags as tables
from vlpet_lightning.interop.flags import parse_flags
from vlpet_lightning.interop.original import placements_from_flags, trainable_from_flags
from vlpet_lightning.pet import LargeGate, MiddleXGate, MiddleYGate, SmallGate

LARGE = "--use_encoder_adapter_gating_large_x_lowrank"
SMALL = "--use_encoder_adapter_gating_small_xy_cat"
MIDDLE_X = "--use_encoder_adapter_gating_middle_xy_add"
MIDDLE_Y = "--use_encoder_adapter_gating_middle_ia3_add"
ENCODER = ["--use_encoder_adapter_down_multihead", "--adapter_down_dim", "8"]
VALUE = ["--use_single_adapter", "--use_decoder_enc_attn_value_parallel_adapter_down_dim"]


# flags ---------------------------------------------------------------------------------------------------------------


def test_every_flag_of_the_original_is_in_one_table():
    names = [
        *tables.HARMLESS_SWITCHES,
        *tables.HARMLESS_VALUES,
        *tables.MODEL,
        *tables.REFUSED_SWITCHES,
        *tables.REFUSED_VALUES,
        *tables.INERT_VALUES,
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert len(names) == 239


def test_flags_abbreviate_as_in_the_original_scripts():
    long = parse_flags(["--feature_type", "RN101", "--encoder_adapter_multihead_num_head", "4", "--unfreeze_bias"])
    short = parse_flags(["--feature", "RN101", "--encoder_adapter_multi", "4", "--unfreeze_bi"])
    assert short == long
    assert (long.encoder_adapter_multihead_num_head, long.unfreeze_bias) == (4, True)


def test_a_flag_that_begins_another_is_not_taken_for_it():
    args = parse_flags(["--use_adapter", "--n_boxes", "36"])
    assert args.use_adapter
    assert not args.use_adapter_down_dim


def test_flags_left_out_have_the_original_defaults():
    args = parse_flags([])
    assert vars(args) == {name: default for name, (_, default) in tables.MODEL.items()}
    assert (args.adapter_down_dim, args.encoder_adapter_multihead_num_head, args.encoder_gating_scaling_factor) == (
        96,
        1,
        1.0,
    )


def test_harmless_flags_change_nothing():
    words = [f"--{name}" for name in tables.HARMLESS_SWITCHES]
    words += [word for name in tables.HARMLESS_VALUES + tables.INERT_VALUES for word in (f"--{name}", "1")]
    assert parse_flags(words) == parse_flags([])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_everything"], "unknown flags of the original: --use_everything"),
        (["--seed", "1", "--rank", "8"], "unknown flags of the original: --rank 8"),
        (["snap"], "unknown flags of the original: snap"),
        (["--use_encoder_adapter_gating"], "ambiguous option: --use_encoder_adapter_gating could match"),
        (["--adapter_down_dim", "many"], "argument --adapter_down_dim: invalid int value: 'many'"),
        (["--n_boxes"], "argument --n_boxes: expected one argument"),
        (["--use_vision", "perhaps"], "expected true or false, got 'perhaps'"),
    ],
)
def test_flags_that_cannot_be_read_are_errors(words, message):
    with pytest.raises(ValueError, match=message):
        parse_flags(words)


def test_no_flag_that_shapes_a_model_of_another_kind_is_ignored():
    for name in tables.REFUSED_SWITCHES:
        with pytest.raises(ValueError, match=f"in a way not supported here: {name}$"):
            parse_flags([f"--{name}"])


def test_a_value_is_refused_unless_it_is_the_default():
    for name, default in tables.REFUSED_VALUES.items():
        assert parse_flags([f"--{name}", str(default)]) == parse_flags([])
        other = "false" if default is True else str(default + 1)
        with pytest.raises(ValueError, match=f"in a way not supported here: {name}$"):
            parse_flags([f"--{name}", other])


def test_all_refused_flags_are_named_at_once():
    words = [f"--{tables.REFUSED_SWITCHES[0]}", "--n_image_tokens", "5", f"--{tables.REFUSED_SWITCHES[-1]}"]
    named = f"{tables.REFUSED_SWITCHES[0]}, {tables.REFUSED_SWITCHES[-1]}, n_image_tokens"
    with pytest.raises(ValueError, match=named):
        parse_flags(words)


# what flags mean -----------------------------------------------------------------------------------------------------


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
    (place,) = placements_from_flags(parse_flags([*ENCODER, *gates]))
    assert place.at == ["encoder.attn", "encoder.ffn"]
    assert type(place.unit(16).gate) is expected


def test_sizes_and_scales_of_the_flags_reach_the_units():
    words = [*ENCODER, LARGE, "--adapter_gating_down_dim", "6", "--encoder_adapter_multihead_num_head", "2"]
    words += [*VALUE, "--decoder_enc_attn_value_parallel_adapter_down_dim", "10"]
    factors = ["--encoder_gating_scaling_factor", "0.3"]
    factors += ["--decoder_enc_attn_value_parallel_adapter_scaling_factor", "4"]
    switches = ["--use_encoder_gating_scaling", "--use_decoder_enc_attn_value_parallel_adapter_scaling"]
    encoder, value = (place.unit(16) for place in placements_from_flags(parse_flags(words + factors)))
    assert (encoder.down.out_features, encoder.gate.down.out_features, encoder.heads) == (8, 6, 2)
    assert value.down.out_features == 10
    assert (encoder.branch_scale, value.scale) == (1.0, 1.0)  # a factor without its switch has no effect there either
    encoder, value = (place.unit(16) for place in placements_from_flags(parse_flags(words + factors + switches)))
    assert (encoder.branch_scale, value.scale) == (0.3, 4.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([LARGE], "a gate without --use_encoder_adapter_down_multihead"),
        (VALUE[1:], r"adapters of their own for each task \(no --use_single_adapter\)"),
    ],
)
def test_combinations_that_mean_another_model_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        placements_from_flags(parse_flags(words))


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ([], ["visual_embedding"]),
        (["--freeze_vis_emb"], []),
        (ENCODER, ["pet", "visual_embedding"]),
        (VALUE, ["pet", "visual_embedding"]),
        (["--unfreeze_encoder_layer_norms"], ["visual_embedding", "encoder.layer_norm"]),
        (["--unfreeze_decoder_layer_norms"], ["visual_embedding", "decoder.layer_norm"]),
        (["--unfreeze_layer_norms"], ["visual_embedding", "encoder.layer_norm", "decoder.layer_norm"]),
        (["--unfreeze_bias"], ["visual_embedding", "bias"]),
    ],
)
def test_flags_say_what_is_trained(words, rules):
    assert trainable_from_flags(parse_flags(words)) == rules
