"""Batches from texts and features, as the data modules build them from files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlpet_lightning.batch import IGNORED, Batch
from vlpet_lightning.tasks import TaskSpec


def prompted(spec: TaskSpec, texts: Sequence[str], prompt: str | None = None) -> list[str]:
    """Return the inputs of questions, with the task's prompt.

    Args:
        spec: Task of all questions.
        texts: ``B`` texts without a prompt.
        prompt: Prompt to use instead of the original's.
    """
    prompt = spec.prompt if prompt is None else prompt
    return [spec.template.format(prompt=prompt, text=text, subtitles="") for text in texts]


def text_batch(
    tokenizer: Any,
    spec: TaskSpec,
    texts: Sequence[str],
    features: Tensor,
    answers: Sequence[str] | None = None,
    prompt: str | None = None,
) -> Batch:
    """Tokenise questions, truncated to the task's limit as in training, and put them beside their features.

    Args:
        tokenizer: The backbone's tokenizer.
        spec: Task of all questions.
        texts: ``B`` texts without a prompt.
        features: ``(B, F, D)``, or ``(B, N, F, D)`` for tasks with several images.
        answers: ``B`` target texts; None for a batch without labels.
        prompt: Prompt to use instead of the original's.
    """
    encoded = _tokens(tokenizer, prompted(spec, texts, prompt), spec.max_text)
    labels = None
    if answers is not None:
        target = _tokens(tokenizer, list(answers), spec.max_target)
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)
    return Batch(
        task=spec.name,
        input_ids=encoded["input_ids"],
        features=features,
        text_mask=encoded["attention_mask"].bool(),
        labels=labels,
        texts=list(texts),
    )


def _tokens(tokenizer: Any, texts: list[str], limit: int | None) -> Any:
    return tokenizer(texts, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt")
