"""Parameter counts, compared exactly with the published counts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from vlpet_lightning.commands.params import report_of
from vlpet_lightning.parameters import ParameterReport

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
VIDEO = ("--model.feature_dim=512", "--model.grid=null")  # CLIP ViT-B/32 features, one token per frame
NO_NORMS = "--model.trainable=[pet,visual_embedding]"


class Row(NamedTuple):
    """Output of the original's print_trainable_params_percentage, and the trained parameters by part.

    ``biases`` are those of linear layers. ``other`` is the rest of the backbone, including T5's relative position
    biases, and the modules that HyperFormer shares between the stacks.
    """

    total: int
    trainable: int
    percent: float
    visual: int
    encoder_pet: int = 0
    encoder_gates: int = 0
    decoder_pet: int = 0
    encoder_norms: int = 0
    decoder_norms: int = 0
    biases: int = 0
    other: int = 0


# VL-PET repository at 7430cad: its scripts' models, counted by its own code. {backbone: {(overlay, overrides): row}}
IMAGE = {
    "bart": {
        ("full",): Row(
            141_156_864, 141_156_864, 100.00, 1_582_848, 0, 0, 0, 19_968, 29_184, 101_376, other=139_423_488
        ),
        ("bitfit",): Row(141_156_864, 1_708_800, 1.21, 1_582_848, 0, 0, 0, 9_984, 14_592, 101_376),
        ("vl_adapter",): Row(145_606_464, 6_081_600, 4.18, 1_582_848, 1_779_840, 0, 2_669_760, 19_968, 29_184),
        ("compacter",): Row(143_395_104, 3_870_240, 2.70, 1_582_848, 895_296, 0, 1_342_944, 19_968, 29_184),
        ("lora",): Row(148_234_752, 8_786_688, 5.93, 1_582_848, 2_359_296, 0, 4_718_592, 9_984, 14_592, 101_376),
        # NVlabs/DoRA
        ("dora",): Row(148_262_400, 8_838_912, 5.96, 1_582_848, 2_368_512, 0, 4_737_024, 19_968, 29_184, 101_376),
        ("prompt_tuning",): Row(142_417_952, 2_843_936, 2.00, 1_582_848, 1_261_088),
        ("hyperformer",): Row(
            148_103_952, 8_579_088, 5.79, 1_582_848, 2_805_080, 0, 4_139_960, 19_968, 29_184, other=2_048
        ),
        ("vlpet_small",): Row(143_845_068, 4_291_020, 2.98, 1_582_848, 1_779_840, 18_444, 889_920, 19_968),
        ("vlpet_middle_x",): Row(143_835_852, 4_281_804, 2.98, 1_582_848, 1_779_840, 9_228, 889_920, 19_968),
        ("vlpet_middle_y",): Row(143_835_840, 4_281_792, 2.98, 1_582_848, 1_779_840, 9_216, 889_920, 19_968),
        ("vlpet_large",): Row(145_606_464, 6_052_416, 4.16, 1_582_848, 1_779_840, 1_779_840, 889_920, 19_968),
    },
    "t5": {
        ("vlpet_small_t5",): Row(233_457_816, 10_518_168, 4.51, 1_581_312, 7_100_928, 36_888, 1_779_840, 19_200),
        ("vlpet_middle_x_t5",): Row(233_439_384, 10_499_736, 4.50, 1_581_312, 7_100_928, 18_456, 1_779_840, 19_200),
        ("vlpet_middle_y_t5",): Row(233_439_360, 10_499_712, 4.50, 1_581_312, 7_100_928, 18_432, 1_779_840, 19_200),
        ("vlpet_large_t5",): Row(240_521_856, 17_582_208, 7.31, 1_581_312, 7_100_928, 7_100_928, 1_779_840, 19_200),
        # the baselines' scripts with model=t5; its code has no LoRA, so the LoRA script trains the same as BitFit's
        ("full_t5",): Row(224_540_160, 224_540_160, 100.00, 1_581_312, 0, 0, 0, 19_200, 28_416, other=222_911_232),
        ("bitfit_t5",): Row(224_540_160, 1_582_080, 0.70, 1_581_312, other=768),
        ("vl_adapter", NO_NORMS): Row(233_439_360, 10_480_512, 4.49, 1_581_312, 3_559_680, 0, 5_339_520),
        ("compacter_t5",): Row(229_016_640, 6_057_792, 2.65, 1_581_312, 1_790_592, 0, 2_685_888),
        ("lora", "--model.placements=[]", "--model.trainable=[visual_embedding,bias]"): Row(
            224_540_160, 1_582_080, 0.70, 1_581_312, other=768
        ),
        ("prompt_tuning_t5",): Row(225_801_248, 2_842_400, 1.26, 1_581_312, 1_261_088),
        ("hyperformer_t5",): Row(231_493_392, 8_534_544, 3.69, 1_581_312, 2_808_152, 0, 4_143_032, other=2_048),
    },
}
FRAMES = {
    ("full",): Row(139_977_216, 139_977_216, 100.00, 403_200, 0, 0, 0, 19_968, 29_184, 101_376, other=139_423_488),
    ("bitfit",): Row(139_977_216, 529_152, 0.38, 403_200, 0, 0, 0, 9_984, 14_592, 101_376),
    ("vl_adapter",): Row(144_426_816, 4_901_952, 3.39, 403_200, 1_779_840, 0, 2_669_760, 19_968, 29_184),
    ("compacter",): Row(142_215_456, 2_690_592, 1.89, 403_200, 895_296, 0, 1_342_944, 19_968, 29_184),
    ("lora",): Row(147_055_104, 7_607_040, 5.17, 403_200, 2_359_296, 0, 4_718_592, 9_984, 14_592, 101_376),
    ("dora_video",): Row(147_082_752, 7_634_688, 5.19, 403_200, 2_368_512, 0, 4_737_024, 9_984, 14_592, 101_376),
    ("prompt_tuning",): Row(141_238_304, 1_664_288, 1.18, 403_200, 1_261_088),
    ("vlpet_small",): Row(142_665_420, 3_111_372, 2.18, 403_200, 1_779_840, 18_444, 889_920, 19_968),
    ("vlpet_middle_x",): Row(142_656_204, 3_102_156, 2.17, 403_200, 1_779_840, 9_228, 889_920, 19_968),
    ("vlpet_middle_y",): Row(142_656_192, 3_102_144, 2.17, 403_200, 1_779_840, 9_216, 889_920, 19_968),
    ("vlpet_large",): Row(144_426_816, 4_872_768, 3.37, 403_200, 1_779_840, 1_779_840, 889_920, 19_968),
}
CASES = [
    *[
        pytest.param(kind, words, row, id=f"image-{kind}-{words[0]}")
        for kind in IMAGE
        for words, row in IMAGE[kind].items()
    ],
    *[pytest.param("bart", (*words, *VIDEO), row, id=f"video-bart-{words[0]}") for words, row in FRAMES.items()],
]

# Only percentages are known for these: paper, table 2 (T5-base, copied there from Ladder Side-Tuning) and table 9
PERCENT = {
    "vl_adapter_t5": 7.98,
    "lora_t5": 7.54,
    "prompt_tuning_t5": 1.26,
    "compacter_small": 2.08,
    "compacter_middle_x": 2.07,
    "compacter_middle_y": 2.07,
    "compacter_large": 3.28,
    "vl_adapter_small": 2.98,
    "vl_adapter_middle_x": 2.98,
    "vl_adapter_middle_y": 2.98,
    "vl_adapter_large": 4.16,
}


@cache
def counted(kind: str, overlay: str, *overrides: str) -> ParameterReport:
    """Return the report of an overlay on a backbone."""
    files = ["image_text.yaml", f"backbone/{kind}_base.yaml", f"pet/{overlay}.yaml"]
    return report_of([*(word for file in files for word in ("--config", str(EXPERIMENTS / file))), *overrides])


def columns(report: ParameterReport, kind: str) -> Row:
    """Convert a report to the columns of the published table."""
    trained = {name: count.trainable for name, count in report.groups.items()}
    biases = trained.pop("biases", 0)
    other = trained.pop("rest of the backbone", 0) + trained.pop("shared by all units", 0)
    linear, relative = (0, biases) if kind == "t5" else (biases, 0)  # T5's linear layers have none
    names = ("visual embedding", "encoder PET", "encoder gates", "decoder PET", "encoder norms", "decoder norms")
    parts = [trained.pop(name, 0) for name in names]
    assert not trained, f"groups without a column: {trained}"
    return Row(report.total, report.trainable, round(report.percent, 2), *parts, linear, other + relative)


@pytest.mark.parametrize(("kind", "words", "row"), CASES)
def test_every_published_count_is_met_to_the_unit(kind, words, row):
    report = counted(kind, *words)
    assert columns(report, kind) == row
    assert sum(row[3:]) == row.trainable
    assert sum(count.total for count in report.groups.values()) == row.total


@pytest.mark.parametrize(  # tests/test_golden.py has the parameters of all of them
    "name", [pytest.param(name, marks=[] if name.endswith("_large") else pytest.mark.slow) for name in PERCENT]
)
def test_published_percentages_are_met(name):
    kind = "t5" if name.endswith("_t5") else "bart"
    assert round(counted(kind, name).percent, 2) == PERCENT[name]


def test_a_plain_value_adapter_beside_compacter_would_not_give_the_published_percentage():
    assert columns(counted("bart", "compacter_small"), "bart").decoder_pet == 6 * 74_608
    plain = counted("bart", "vl_adapter_small").groups["decoder PET"].total
    report = counted("bart", "compacter_small")
    more = plain - 6 * 74_608
    assert round(100 * (report.trainable + more) / (report.total + more), 2) == 2.38
