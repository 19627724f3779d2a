"""Token lengths of texts before truncation, and the parts lost by truncation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_modules.annotations.records import Samples
from data_modules.batches.prompts import CHUNK, input_texts
from vlpet_lightning.tasks import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 32  # of a text histogram
LIMIT = "│"


@dataclass(frozen=True)
class Lengths:
    """Token lengths of a split's inputs or targets.

    Args:
        task: The task.
        split: The split.
        part: ``input`` or ``target``.
        tokens: ``(n,)`` lengths in tokens including special tokens, before truncation.
        limit: Maximum length; None if there is no truncation.
    """

    task: str
    split: str
    part: str
    tokens: np.ndarray
    limit: int | None

    @property
    def cut(self) -> int:
        """Number of truncated texts."""
        return 0 if self.limit is None else int((self.tokens > self.limit).sum())

    @property
    def bars(self) -> tuple[str, str]:
        """Histogram in block characters, in two parts: within the limit, and beyond it."""
        counts, kept = self._histogram()
        heights = np.ceil(counts / counts.max() * len(BARS)).astype(int)
        drawn = "".join((" " + BARS)[height] for height in heights)
        return drawn[:kept], drawn[kept:]

    def _histogram(self) -> tuple[np.ndarray, int]:
        """Return counts by length, and the number of columns within the limit, which falls between two columns."""
        low, high = int(self.tokens.min()), int(self.tokens.max())
        if self.limit is None or high <= self.limit:
            width = ceil((high - low + 1) / COLUMNS)
            counts = np.bincount((self.tokens - low) // width)
            return counts, len(counts)
        high = min(high, 2 * self.limit)  # outliers go into the last column
        width = ceil((high - min(low, self.limit) + 1) / COLUMNS)
        kept = max(0, ceil((self.limit + 1 - low) / width))
        start = self.limit + 1 - kept * width
        return np.bincount((np.minimum(self.tokens, high) - start) // width), kept


def token_lengths(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, tell: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Count the tokens of texts, including special tokens, without truncation; duplicates are tokenised once.

    Args:
        texts: ``n`` texts.
        tokenizer: A tokenizer of the transformers library.
        tell: Progress callback, called after each chunk with the number of distinct texts done and in total.

    Returns:
        ``(n,)`` int64.
    """
    index: dict[str, int] = {}
    entries = np.fromiter((index.setdefault(text, len(index)) for text in texts), dtype=np.int64)
    backend: Any = tokenizer.backend_tokenizer  # twice as fast as calling the tokenizer
    backend.no_truncation()
    backend.no_padding()
    lengths: list[int] = []
    for chunk in _chunks(index):
        lengths.extend(map(len, backend.encode_batch_fast(chunk)))
        if tell is not None:
            tell(len(lengths), len(index))
    return np.asarray(lengths, dtype=np.int64)[entries]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


@dataclass(frozen=True)
class Lost:
    """Counts of inputs that lose essential parts by truncation.

    Args:
        prompt: Number of inputs that lose their whole prompt.
        text: Number of inputs that lose all of their text.
    """

    prompt: int
    text: int


def lost_by_cutting(
    task: TaskSpec, samples: Samples, prompt: str, tokenizer: PreTrainedTokenizerBase, cut: np.ndarray
) -> Lost:
    """Count the inputs that lose their whole prompt, or all of their text, by truncation at the end.

    Args:
        task: The task.
        samples: Its samples.
        prompt: The task's prompt, part of every input.
        tokenizer: A tokenizer of the transformers library.
        cut: ``(n,)`` bool mask of the samples that are too long.
    """
    rows = np.flatnonzero(cut).tolist()
    # only these columns are read
    few = replace(samples, texts=[samples.texts[r] for r in rows], images=[samples.images[r] for r in rows])
    prompts = texts = 0
    for text, (length, end) in zip(few.texts, _ends(task, few, prompt, tokenizer), strict=True):
        prompts += bool(prompt.strip()) and end <= length - len(_from(task, "{prompt}", prompt, text))
        texts += bool(text) and end <= length - len(_from(task, "{text}", prompt, text))
    return Lost(prompts, texts)


def _ends(
    task: TaskSpec, samples: Samples, prompt: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, int]]:
    """Yield the number of characters of each input, and the end of its last character within the limit."""
    for chunk in _chunks(input_texts(task, samples, prompt)):
        encoded: Any = tokenizer(chunk, truncation=True, max_length=task.max_text, return_offsets_mapping=True)
        for text, offsets in zip(chunk, encoded["offset_mapping"], strict=True):
            yield len(text), max((end for _, end in offsets), default=0)


def _from(task: TaskSpec, name: str, prompt: str, text: str) -> str:
    """Return the part of an input that starts at one of its fields."""
    return task.template[task.template.index(name) :].format(prompt=prompt, text=text, subtitles="")


def plot(lengths: Sequence[Lengths], path: Path) -> None:
    """Plot the histograms of all splits, with one panel per task for inputs and one for targets.

    Args:
        lengths: Lengths to plot.
        path: Image file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels: dict[tuple[str, str], list[Lengths]] = {}
    for one in lengths:
        panels.setdefault((one.task, one.part), []).append(one)
    columns = min(4, len(panels))
    figure = Figure(figsize=(3.2 * columns, 2.4 * ceil(len(panels) / columns)), layout="constrained")
    axes = figure.subplots(ceil(len(panels) / columns), columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, ((task, part), drawn) in zip(axes, panels.items(), strict=False):
        low, high = min(one.tokens.min() for one in drawn), max(one.tokens.max() for one in drawn)
        edges = np.arange(low, high + 2, ceil((high - low + 1) / 40)) - 0.5
        edges = edges if edges[-1] > high else np.append(edges, high + 0.5)
        for one in drawn:
            axis.hist(one.tokens, edges, density=True, histtype="step", label=one.split)
        limit = drawn[0].limit
        if limit is not None and limit < 2 * high:
            axis.axvline(limit + 0.5, color="tab:red", linestyle="--", label=f"limit {limit}")
        axis.set_title(f"{task} {part}", fontsize=9, loc="left")
        axis.set_xlabel("tokens", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)
