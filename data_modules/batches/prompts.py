"""Input texts of samples, built from a task's template and shortened to its length limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_modules.annotations.columns import Coded, Strings, coded
from data_modules.annotations.records import Samples
from vlpet_lightning.tasks import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 10_000  # texts per tokenizer call


def input_texts(task: TaskSpec, samples: Samples, prompt: str) -> Iterator[str]:
    """Build the untruncated input of every sample."""
    for text, images in zip(samples.texts, samples.images, strict=True):
        yield _filled(task, prompt, text, samples.subtitles.get(images[0], ""))


def short_subtitles(task: TaskSpec, samples: Samples, prompt: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Build the input of every sample, with subtitles truncated at a word boundary so that it fits the task's limit.

    A question that is too long by itself loses all subtitles and is truncated at its end during tokenisation.
    """
    limit = task.max_text
    if limit is None:
        yield from input_texts(task, samples, prompt)
        return
    starts_of = {video: _token_starts(text, tokenizer) for video, text in samples.subtitles.items()}
    rests = dict.fromkeys(samples.texts, 0)
    for text, ids in zip(rests, _ids([_filled(task, prompt, text, "") for text in rests], tokenizer), strict=True):
        rests[text] = len(ids)
    for text, images in zip(samples.texts, samples.images, strict=True):
        subtitles, starts = samples.subtitles[images[0]], starts_of[images[0]]
        room = max(0, limit - rests[text])
        if len(starts) > room:
            subtitles = _whole_words(subtitles, starts[room])
            # tokens may merge at the cut
            while subtitles and len(_ids([_filled(task, prompt, text, subtitles)], tokenizer)[0]) > limit:
                subtitles = subtitles.rpartition(" ")[0]
        yield _filled(task, prompt, text, subtitles)


def distinct_inputs(task: TaskSpec, samples: Samples, prompt: str) -> Coded:
    """Build the untruncated input of every sample as a column, without building equal inputs twice."""
    if samples.subtitles:
        return Coded.of(input_texts(task, samples, prompt))
    texts = coded(samples.texts)
    return Coded(texts.codes, Strings.of(_filled(task, prompt, text, "") for text in texts.values))


def source_of(task: TaskSpec, samples: Samples, prompt: str, short: bool) -> Iterator[str | bytes]:
    """Yield everything that inputs depend on, as the key of their cached tokens.

    Args:
        task: The task.
        samples: Its samples.
        prompt: Its prompt.
        short: Whether the inputs are those of :func:`short_subtitles`.
    """
    yield from ("short subtitles" if short else "inputs", task.template, prompt)
    yield from coded(samples.texts).parts()
    if samples.subtitles:
        yield from Coded.of(images[0] for images in samples.images).parts()
    for video, text in samples.subtitles.items():
        yield from (video, text)


def _whole_words(text: str, end: int) -> str:
    """Return the words of a text that end before a position."""
    if " " not in text[max(0, end - 1) : end + 1]:  # within a word
        end = text.rfind(" ", 0, end) + 1
    return text[:end].rstrip()


def _filled(task: TaskSpec, prompt: str, text: str, subtitles: str) -> str:
    return task.template.format(prompt=prompt, text=text, subtitles=subtitles)


def _token_starts(text: str, tokenizer: Any) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [start for start, _ in encoded["offset_mapping"]]


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    found: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        found.extend(tokenizer(list(texts[start : start + CHUNK]))["input_ids"])
    return found
