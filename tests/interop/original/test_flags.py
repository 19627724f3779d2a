"""Parsing of the original's command lines, and refused flags."""

from __future__ import annotations

from collections import Counter

import pytest

from vlpet_lightning.interop.original import flags as tables
from vlpet_lightning.interop.original.flags import parse_flags


def test_every_flag_of_the_original_is_in_one_table():
    names = [
        *tables.HARMLESS_SWITCHES,
        *tables.HARMLESS_VALUES,
        *tables.RECIPE,
        *tables.MODEL,
        *tables.BROKEN,
        *tables.REFUSED_SWITCHES,
        *tables.REFUSED_VALUES,
        *tables.INERT_VALUES,
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    dora = {"use_dora", "lora_settings", "dora_simple", "project_name"}
    side = {"use_side_transformers", "side_reduction_factor", "encoder_side_layers", "decoder_side_layers"}
    side |= {"load_side_pretrained_weights", "samples_for_fisher", "use_bitfit"}
    side |= {"RefCOCO_GT", "RefCOCO_BUTD", "shuffle_boxes", "vis_pointer", "cls_task"}  # read for other tasks
    assert dora | side < set(names)
    assert len(set(names) - dora - side) == 239  # VL-PET's own


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
    assert vars(args) == {name: default for name, (_, default) in (tables.RECIPE | tables.MODEL).items()}
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


def test_a_flag_that_is_broken_in_the_original_says_how():
    for name, why in tables.BROKEN.items():
        with pytest.raises(ValueError, match=f"broken in the original.*--{name} .{why}"):
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
