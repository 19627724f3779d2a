"""Contact sheet: predictions on test images."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from vlpet_lightning.browse.thumbnails import find_images
from vlpet_lightning.metrics.questions import question_score, truth
from vlpet_lightning.tasks import TASKS
from vlpet_lightning.vision.images import read_image

COLUMNS = 4  # examples per task
HEIGHT = 256  # pixels of a picture, at most


def _is_right(prediction: str, reference: dict[str, Any]) -> bool | None:
    score = question_score(prediction, reference)
    return None if score is None else score > 0.5


def _picture(names: list[str], store: str, files: Mapping[str, Path]) -> np.ndarray:
    """Return the images of a sample side by side, scaled to the same height, with a white gap."""
    missing = [name for name in names if f"{store}/{name}" not in files]
    if missing:
        raise FileNotFoundError(f"--images: no image {store}/{missing[0]}: give the folder that has the test images")
    opened = [read_image(files[f"{store}/{name}"]) for name in names]
    height = min(HEIGHT, *(image.height for image in opened))
    sizes = [(max(1, round(image.width * height / image.height)), height) for image in opened]
    pictures = [np.asarray(image.resize(size)) for image, size in zip(opened, sizes, strict=True)]
    gap = np.full((pictures[0].shape[0], 6, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)][:-1]
    return np.concatenate(parts, axis=1)


def _show(axis: Axes, task: str, entry: dict[str, Any], files: Mapping[str, Path]) -> None:
    reference = entry["reference"]
    right = _is_right(entry["prediction"], reference)
    axis.imshow(_picture(list(entry["images"]), TASKS[task].splits["test"].features, files))
    axis.axis("off")
    wrap = 34
    question = "\n".join(textwrap.wrap(entry["text"] or task, wrap))
    axis.set_title(question, fontsize=8, loc="left")
    said = "\n".join(textwrap.wrap(f"said: {entry['prediction']}", wrap))
    true = "\n".join(textwrap.wrap(f"true: {next(iter(truth(reference)), 'not public')}", wrap))
    colour = {True: "tab:green", False: "tab:red", None: "black"}[right]
    axis.text(0, -0.04, said, transform=axis.transAxes, fontsize=8, va="top", color=colour)
    axis.text(0, -0.04 - 0.09 * (said.count("\n") + 1), true, transform=axis.transAxes, fontsize=8, va="top")


def contact_sheet(predictions: Mapping[str, Sequence[dict[str, Any]]], images: Path, path: Path, title: str) -> None:
    """Draw test images with question, prediction and reference: one row per task, evenly spaced over the test split.

    Args:
        predictions: Entries of the prediction files, by task.
        images: Folder with ``<store>/<image id>.png``, or of another image format.
        path: Image file to write.
        title: Name of the run.

    Raises:
        FileNotFoundError: If an image is missing.
    """
    files = find_images(images, {TASKS[task].splits["test"].features for task in predictions})
    figure, axes = plt.subplots(
        len(predictions), COLUMNS, figsize=(3.1 * COLUMNS, 3.3 * len(predictions)), squeeze=False, layout="constrained"
    )
    try:
        figure.suptitle(f"{title}: every sheet shows the same evenly spaced test questions", fontsize=10)
        for row, (task, entries) in enumerate(predictions.items()):
            places = np.linspace(0, len(entries) - 1, COLUMNS).round().astype(int)
            for axis, place in zip(axes[row], places, strict=True):
                _show(axis, task, entries[place], files)
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
