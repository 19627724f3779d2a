"""Table of the benchmark's tasks: all task-specific settings are fields of :class:`TaskSpec`.

Sources are files of HenryHZY/VL-PET (``src/``) unless noted otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Split:
    """Source files of one split.

    Args:
        annotations: Annotation files relative to the data root, read in order.
        features: Name of the feature store in ``features/``.
    """

    annotations: tuple[str, ...]
    features: str


@dataclass(frozen=True)
class Generation:
    """Decoding settings. ``max_length`` includes the decoder's start token, as in the original's generate."""

    num_beams: int
    max_length: int = 20


@dataclass(frozen=True)
class TaskSpec:
    """Settings of one task of the benchmark.

    Args:
        name: Name used in configs, logs and files.
        prompt: Task prompt in the input.
        instruction: Task prompt in the input of a decoder-only model, in the protocol ``vlm``.
        images: Number of images per sample; a clip counts as one.
        splits: ``train``, ``val`` and ``test``.
        loss: ``sample``: mean over samples of the mean token loss; ``weighted_sample``: the same, with each sample
            multiplied by its weight; ``token``: mean over all target tokens of the batch.
        max_text: Maximum input length in tokens, including special tokens; None for no limit.
        max_target: Maximum target length in tokens, including special tokens; None for no limit.
        generation: Decoding settings; None if the answer is true or false, decided by the logits of the first step.
        batch_share: ``(a, b)``: the task's batch size is ``int(batch_size * a / b)``.
        score: Name of the metric that enters the benchmark's average for this task.
        template: Template of the input, with ``{prompt}``, ``{text}`` and ``{subtitles}``.
        subtitles: File with the clips' subtitles, relative to the data root.
    """

    name: str
    prompt: str
    images: int
    splits: dict[str, Split]
    loss: Literal["sample", "weighted_sample", "token"]
    max_text: int | None
    max_target: int | None
    generation: Generation | None
    batch_share: tuple[int, int]
    score: str
    instruction: str = ""
    template: str = "{prompt}{text}"
    subtitles: str | None = None

    def batch_size(self, base: int) -> int:
        """Return this task's batch size if VQA's is ``base``, as multitask.py builds its loaders."""
        numerator, denominator = self.batch_share
        return max(1, int(base * numerator / denominator))


TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            name="vqa",
            prompt="vqa: ",
            images=1,
            splits={
                "train": Split(("vqa/karpathy_train.json",), "COCO"),
                "val": Split(("vqa/karpathy_val.json",), "COCO"),
                "test": Split(("vqa/karpathy_test.json",), "COCO"),
            },
            loss="weighted_sample",  # multitask_model.py: samples are weighted by the score of the sampled answer
            max_text=20,  # vqa_clip_data.py, __getitem__
            max_target=10,
            generation=Generation(num_beams=1),
            batch_share=(1, 1),
            score="accuracy_original",  # used by the published tables; "accuracy" is from the official evaluator
        ),
        TaskSpec(
            name="gqa",
            prompt="gpa: ",  # sic: the original's prompt; `gqa: ` in the corrected protocol
            images=1,
            splits={
                "train": Split(("GQA/train.json", "GQA/valid.json"), "VG"),
                # the original reports GQA on testdev, which is also its validation split
                "val": Split(("GQA/testdev.json",), "GQA"),
                "test": Split(("GQA/testdev.json",), "GQA"),
            },
            loss="sample",
            max_text=20,  # gqa_clip_data.py, __getitem__
            max_target=None,
            generation=Generation(num_beams=1),
            batch_share=(100, 60),
            score="accuracy",
        ),
        TaskSpec(
            name="nlvr2",
            prompt="nlvr: ",
            instruction="True or false? ",
            images=2,
            splits={
                "train": Split(("nlvr/train.json",), "nlvr"),
                "val": Split(("nlvr/valid.json",), "nlvr"),
                "test": Split(("nlvr/test.json",), "nlvr"),
            },
            loss="sample",
            max_text=None,
            max_target=None,
            generation=None,
            batch_share=(20, 60),
            score="accuracy",
        ),
        TaskSpec(
            name="caption",
            prompt="caption: ",
            instruction="Describe the image.",
            images=1,
            splits={
                "train": Split(("COCO/dataset_coco.json",), "COCO"),
                "val": Split(("COCO/dataset_coco.json",), "COCO"),
                "test": Split(("COCO/dataset_coco.json",), "COCO"),
            },
            loss="token",
            max_text=40,
            max_target=40,
            generation=Generation(num_beams=5),
            batch_share=(50, 60),
            score="cider",
        ),
        TaskSpec(
            name="tvqa",
            prompt="tvqa: ",
            instruction="Which answer is right?",
            images=1,
            splits={
                "train": Split(("video/ann/tvqa/tvqa_train.jsonl",), "tv"),
                "val": Split(("video/ann/tvqa/tvqa_val.jsonl",), "tv"),
                "test": Split(
                    ("video/ann/tvqa/tvqa_test_public.jsonl", "video/ann/tvqa/tvqa_test_release.jsonl"), "tv"
                ),
            },
            loss="sample",
            max_text=600,  # video/tvqa_data.py, __getitem__
            max_target=20,
            generation=Generation(num_beams=5),  # not set there: multitask_video.py copies num_beams into the config
            batch_share=(1, 1),
            score="accuracy",
            template="[Subs] {subtitles} {text} {prompt}",
            subtitles="video/ann/tv_subtitles.jsonl",
        ),
        TaskSpec(
            name="how2qa",
            prompt="how2qa: ",
            instruction="Which answer is right?",
            images=1,
            splits={
                "train": Split(("video/ann/how2qa/how2qa_train_release.jsonl",), "how2"),
                "val": Split(("video/ann/how2qa/how2qa_val_release.jsonl",), "how2"),
                "test": Split(("video/ann/how2qa/how2qa_test_public_release.jsonl",), "how2"),
            },
            loss="sample",
            max_text=600,
            max_target=20,
            generation=Generation(num_beams=5),
            batch_share=(1, 1),
            score="accuracy",
            template="[Subs] {subtitles} {text} {prompt}",
            subtitles="video/ann/how2_subtitles.jsonl",
        ),
        TaskSpec(
            name="tvc",
            prompt="tvc: ",
            instruction="Describe the clip.",
            images=1,
            splits={
                split: Split((f"video/ann/tvc/tvc_{split}_release.jsonl",), "tv") for split in ("train", "val", "test")
            },
            loss="sample",
            max_text=600,  # video/tvc_data.py, __getitem__
            max_target=20,
            generation=Generation(num_beams=5),
            batch_share=(1, 1),
            score="cider",
            template="[Subs] {subtitles} {text} {prompt}",
            subtitles="video/ann/tv_subtitles.jsonl",
        ),
        TaskSpec(
            name="yc2c",
            prompt="yc2c: ",
            instruction="Describe the step of the recipe.",
            images=1,
            splits={
                split: Split((f"video/ann/yc2c/yc2c_{split}_release.jsonl",), "yc2")
                for split in ("train", "val", "test")
            },
            loss="sample",
            max_text=600,  # video/yc2c_data.py, __getitem__
            max_target=20,
            generation=Generation(num_beams=5),
            batch_share=(1, 1),
            score="cider",
            template="[Subs] {subtitles} {prompt}",
            subtitles="video/ann/yc2_subtitles.jsonl",
        ),
    )
}

IMAGE_TEXT = ("vqa", "gqa", "nlvr2", "caption")
VIDEO_TEXT = ("tvqa", "how2qa", "tvc", "yc2c")


def task(name: str) -> TaskSpec:
    """Return the settings of a task.

    Raises:
        ValueError: If the task is unknown; the message lists the known tasks.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(sorted(TASKS))}")
    return TASKS[name]
