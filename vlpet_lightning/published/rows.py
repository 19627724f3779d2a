"""Published results of the benchmark, by method and backbone; CIDEr times 100, all other scores in percent.

Means over three seeds, with the deviation where the source gives one, of the last epoch (image-text) under the protocol
``original``. None was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "VL-PET (ICCV 2023), table 2"
LST = "VL-PET (ICCV 2023), table 2, from Ladder Side-Tuning"
TABLE_9 = "VL-PET (ICCV 2023), table 9"
DORA = "DoRA (ICML 2024)"
DORA_README = "NVlabs/DoRA, image_video_text_understanding"
COEFF = "Coeff-Tuning"
VL_ADAPTER = "VL-Adapter (CVPR 2022)"
SECONDARY = "VL-PET on video-text, from a secondary source"

Score = tuple[float, float | None]  # mean and deviation


@dataclass(frozen=True)
class Row:
    """One published row.

    Args:
        key: Name of its recipe in ``recipes.json``; rows of methods that are not implemented here have none there.
        method: The method's name in the source.
        backbone: ``BART-base`` or ``T5-base``.
        trained: Trained parameters in percent; None if the source does not say.
        scores: Mean and deviation of each task's main score; empty if only the average is known.
        average: Mean and deviation of the average over the tasks.
        source: The source of the numbers.
        seeds: Number of seeds; None if the source does not say.
    """

    key: str
    method: str
    backbone: str
    trained: float | None
    scores: dict[str, Score]
    average: Score
    source: str
    seeds: int | None


# key, method, trained %, then VQA, GQA, NLVR2, CIDEr and average, each as mean and deviation
Values = tuple[str, str, float, tuple[float, ...]]

TABLE_2_BART: tuple[Values, ...] = (
    ("full/bart", "Full FT", 100, (66.88, 0.17, 56.79, 0.41, 73.66, 0.21, 112.01, 0.93, 77.33, 0.39)),
    ("bitfit/bart", "BitFit", 1.21, (52.94, 0.52, 43.15, 0.94, 52.29, 0.76, 111.44, 0.41, 64.96, 0.17)),
    ("prompt_tuning/bart", "Prompt Tuning", 2.00, (44.12, 0.45, 36.37, 0.35, 51.34, 0.83, 105.02, 0.24, 59.21, 0.21)),
    ("compacter/bart", "Compacter", 2.70, (64.63, 0.09, 52.70, 0.24, 71.11, 0.35, 114.69, 0.42, 75.78, 0.21)),
    ("hyperformer/bart", "HyperFormer", 5.79, (64.62, 0.67, 52.55, 0.64, 70.74, 1.45, 114.84, 0.38, 75.69, 0.74)),
    ("lora/bart", "LoRA", 5.93, (65.15, 0.16, 53.66, 0.84, 72.58, 0.73, 115.01, 0.26, 76.60, 0.32)),
    ("vl_adapter/bart", "VL-Adapter", 4.18, (65.76, 0.28, 54.16, 0.44, 73.19, 0.71, 114.61, 0.26, 76.93, 0.25)),
    ("vlpet_small/bart", "VL-PET-small", 2.98, (65.43, 0.06, 54.03, 0.14, 72.43, 0.22, 120.68, 0.35, 78.14, 0.11)),
    ("vlpet_middle_x/bart", "VL-PET-middleX", 2.98, (65.54, 0.09, 54.53, 0.15, 72.66, 0.17, 120.72, 0.51, 78.37, 0.14)),
    ("vlpet_middle_y/bart", "VL-PET-middleY", 2.98, (65.36, 0.15, 53.83, 0.39, 73.43, 0.78, 120.31, 0.09, 78.23, 0.19)),
    ("vlpet_large/bart", "VL-PET-large", 4.16, (66.17, 0.27, 55.11, 0.17, 73.43, 0.35, 122.03, 0.46, 79.18, 0.14)),
)

TABLE_2_T5_LST: tuple[Values, ...] = (
    ("full_t5/t5", "Full FT", 100, (67.10, 0.10, 56.30, 0.30, 74.30, 0.40, 112.20, 0.30, 77.50, 0.30)),
    ("bitfit_t5/t5", "BitFit", 0.83, (55.10, 0.20, 45.50, 0.20, 51.70, 1.10, 101.20, 0.20, 63.40, 0.10)),
    ("prompt_tuning_t5/t5", "Prompt Tuning", 1.26, (47.40, 0.70, 40.60, 0.40, 51.00, 0.40, 96.10, 0.90, 58.80, 0.60)),
    ("lora_t5/t5", "LoRA", 7.54, (63.70, 0.20, 53.30, 0.10, 70.00, 0.30, 110.30, 0.40, 74.30, 0.10)),
    ("vl_adapter_t5/t5", "VL-Adapter", 7.98, (67.10, 0.10, 56.00, 0.40, 72.70, 0.30, 111.80, 0.10, 76.90, 0.20)),
    ("lst_t5/t5", "LST", 7.46, (66.50, 0.10, 55.90, 0.10, 71.60, 0.30, 113.50, 0.30, 76.90, 0.10)),
)

TABLE_2_T5: tuple[Values, ...] = (
    ("vlpet_small_t5/t5", "VL-PET-small", 4.51, (65.88, 0.31, 54.96, 1.01, 72.64, 0.09, 120.05, 0.41, 78.38, 0.37)),
    (
        "vlpet_middle_x_t5/t5",
        "VL-PET-middleX",
        4.50,
        (66.63, 0.14, 55.87, 0.25, 74.11, 0.37, 120.41, 0.31, 79.26, 0.26),
    ),
    (
        "vlpet_middle_y_t5/t5",
        "VL-PET-middleY",
        4.50,
        (66.62, 0.20, 55.87, 0.13, 73.91, 0.45, 120.26, 0.40, 79.17, 0.08),
    ),
    ("vlpet_large_t5/t5", "VL-PET-large", 7.31, (66.95, 0.21, 56.06, 0.21, 73.42, 0.46, 121.66, 0.06, 79.52, 0.21)),
)

TABLE_9_BART: tuple[Values, ...] = (
    ("compacter_small/bart", "Compacter + G_small + LW", 2.08,
     (64.14, 0.05, 52.84, 0.45, 71.04, 0.54, 118.77, 0.31, 76.70, 0.08)),
    ("compacter_middle_x/bart", "Compacter + G_middleX + LW", 2.07,
     (64.35, 0.10, 53.10, 0.73, 70.57, 0.44, 119.02, 0.37, 76.76, 0.17)),
    ("compacter_middle_y/bart", "Compacter + G_middleY + LW", 2.07,
     (64.00, 0.12, 52.49, 0.60, 70.81, 0.68, 117.48, 0.11, 76.20, 0.33)),
    ("compacter_large/bart", "Compacter + G_large + LW", 3.28,
     (65.60, 0.15, 54.05, 0.30, 71.66, 0.17, 119.55, 0.23, 77.72, 0.15)),
    ("vl_adapter_small/bart", "VL-Adapter + G_small + LW", 2.98,
     (65.56, 0.17, 54.34, 0.32, 71.95, 0.23, 119.10, 0.25, 77.74, 0.11)),
    ("vl_adapter_middle_x/bart", "VL-Adapter + G_middleX + LW", 2.98,
     (65.73, 0.12, 54.90, 0.10, 73.04, 0.50, 118.34, 0.91, 78.00, 0.31)),
    ("vl_adapter_middle_y/bart", "VL-Adapter + G_middleY + LW", 2.98,
     (65.67, 0.17, 54.11, 0.29, 73.18, 0.34, 117.38, 0.52, 77.58, 0.08)),
    ("vl_adapter_large/bart", "VL-Adapter + G_large + LW", 4.16,
     (66.31, 0.23, 55.09, 0.37, 73.46, 0.37, 119.05, 0.83, 78.47, 0.11)),
)  # fmt: skip

IMAGE = ("vqa", "gqa", "nlvr2", "caption")
VIDEO = ("tvqa", "how2qa", "tvc", "yc2c")


def _rows(table: tuple[Values, ...], backbone: str, source: str) -> list[Row]:
    found = []
    for key, method, trained, numbers in table:
        pairs: list[Score] = list(zip(numbers[::2], numbers[1::2], strict=True))
        scores = dict(zip(IMAGE, pairs[:-1], strict=True))
        found.append(Row(key, method, backbone, trained, scores, pairs[-1], source, 3))
    return found


def _plain(
    key: str, method: str, trained: float | None, average: float, source: str, scores: tuple[float, ...] = ()
) -> Row:
    """Return a BART row without deviations."""
    tasks = VIDEO if key.endswith("/video") else IMAGE
    found: dict[str, Score] = {task: (score, None) for task, score in zip(tasks, scores, strict=False)}
    return Row(key, method, "BART-base", trained, found, (average, None), source, None)


ROWS: tuple[Row, ...] = (
    *_rows(TABLE_2_BART, "BART-base", PAPER),
    *_rows(TABLE_2_T5_LST, "T5-base", LST),
    *_rows(TABLE_2_T5, "T5-base", PAPER),
    *_rows(TABLE_9_BART, "BART-base", TABLE_9),
    _plain("dora/bart", "DoRA", 5.96, 77.4, DORA, (65.8, 54.7, 73.1, 115.9)),
    _plain("coeff_tuning_dora/bart", "Coeff-Tuning + DoRA", 5.96, 77.7, COEFF),
    _plain("vlpet_large/video", "VL-PET-large", None, 88.63, SECONDARY),
    _plain("vl_adapter/video", "VL-Adapter (re-run)", None, 87.95, SECONDARY),
    _plain("lora/video", "LoRA (re-run)", None, 83.77, SECONDARY),
    _plain("full/video", "Full FT", None, 87.4, VL_ADAPTER, (76.3, 73.9, 45.7, 154.0)),
    _plain("vl_adapter/video", "VL-Adapter", 3.39, 87.4, VL_ADAPTER, (76.6, 73.9, 46.3, 152.9)),
    _plain("lora/video", "LoRA", 5.17, 83.4, VL_ADAPTER, (75.5, 72.9, 44.6, 140.9)),
    _plain("dora_video/video", "DoRA", 5.19, 85.4, DORA_README, (76.3, 74.1, 45.8, 145.4)),
)
