"""Answers of a model as text, and the most probable answers with their probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from vlpet_lightning.batch import Batch
from vlpet_lightning.model import VLModel
from vlpet_lightning.tasks import task

WORDS = ("false", "true")


class Answer(NamedTuple):
    """An answer and its probability.

    For generated answers, the probability is that of the whole sequence of tokens including its end, in float32. The
    probabilities of all possible sequences sum to 1, so those of the best few need not. For a choice between true and
    false, they sum to 1.
    """

    text: str
    probability: float


@contextmanager
def evaluation_mode(model: VLModel) -> Iterator[VLModel]:
    """Switch a model to evaluation mode, and every module back to its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def choice_tokens(tokenizer: Any) -> tuple[int, int]:
    """Return the first token of "false" and of "true" (src/nlvr_clip_data.py of HenryHZY/VL-PET)."""
    false, true = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS)
    return false, true


def decoded(tokenizer: Any, ids: Tensor) -> list[str]:
    """Return generated token ids as text."""
    # transformers 4.2.1 removed spaces before punctuation by default
    return tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True, clean_up_tokenization_spaces=True)


def answer_batch(model: VLModel, tokenizer: Any, batch: Batch) -> list[str]:
    """Predict the answers to a batch as text; for classification tasks, "true" or "false"."""
    spec = task(batch.task)
    if spec.generation is None:
        return [WORDS[index] for index in model.choose(batch, choice_tokens(tokenizer)).tolist()]
    ids = model.generate(batch, num_beams=spec.generation.num_beams, max_length=spec.generation.max_length)
    return decoded(tokenizer, ids)


def top_answers(model: VLModel, tokenizer: Any, batch: Batch, count: int) -> list[list[Answer]]:
    """Return the most probable answers to each question of a batch.

    One answer is that of :func:`answer_batch`; several are found by a beam search with at least as many beams.

    Args:
        model: Model in evaluation mode.
        tokenizer: Its tokenizer.
        batch: ``B`` questions of one task.
        count: Number of answers per question; fewer if the search finds fewer different ones. At most two for a choice
            between true and false.

    Returns:
        For each question its answers, most probable first.
    """
    spec = task(batch.task)
    if spec.generation is None:
        return [pairs[:count] for pairs in _choices(model, tokenizer, batch)]
    # a single answer is the one that an evaluation gives, which for some tasks is found by a greedy search
    beams = spec.generation.num_beams if count == 1 else max(count, spec.generation.num_beams)
    kept = 1 if count == 1 else beams
    ids = model.generate(batch, num_beams=beams, max_length=spec.generation.max_length, answers=kept)
    chances = sequence_probabilities(model, batch, ids).view(len(batch), kept).tolist()
    texts = decoded(tokenizer, ids)
    found = []
    for row, probabilities in enumerate(chances):
        best: dict[str, float] = {}
        for text, probability in zip(texts[row * kept : (row + 1) * kept], probabilities, strict=True):
            best[text] = max(probability, best.get(text, 0.0))
        ordered = sorted(best.items(), key=lambda item: -item[1])
        found.append([Answer(*item) for item in ordered[:count]])
    return found


@torch.no_grad()
def sequence_probabilities(model: VLModel, batch: Batch, ids: Tensor) -> Tensor:
    """Return the probability of each generated sequence, including its end.

    Args:
        model: The model.
        batch: ``B`` questions.
        ids: ``(B * K, L)`` generated token ids, K per question, starting with the decoder's start token.

    Returns:
        ``(B * K,)`` float32 probabilities.
    """
    repeats = len(ids) // len(batch)
    encoded = model.encode(batch), model.mask(batch)
    states, mask = tree_map(lambda tensor: tensor.repeat_interleave(repeats, dim=0), encoded)
    prefix = model.decoder_prefix(len(ids))
    hidden = model.network.decode(model.lm, states, mask, ids[:, :-1], prefix)
    chances = F.log_softmax(model.logits(hidden).float(), dim=-1)
    targets = ids[:, 1:]
    ended = (targets == model.end_token).cumsum(dim=1)
    real = (ended == 0) | ((ended == 1) & (targets == model.end_token))
    if model.lm.generation_config.forced_bos_token_id is not None:
        real[:, 0] = False  # a forced token is certain
    return (chances.gather(2, targets.unsqueeze(-1)).squeeze(-1) * real).sum(dim=1).exp()


@torch.no_grad()
def _choices(model: VLModel, tokenizer: Any, batch: Batch) -> list[list[Answer]]:
    logits = model.choice_logits(batch, choice_tokens(tokenizer)).float().softmax(dim=1).tolist()
    pairs = [[Answer(word, chance) for word, chance in zip(WORDS, row, strict=True)] for row in logits]
    return [sorted(pair, key=lambda answer: -answer.probability) for pair in pairs]
