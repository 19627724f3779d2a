"""Our beam search compared with exhaustive search, and with the library's where both must agree."""

from __future__ import annotations

import itertools

import pytest
import torch

from vlpet_lightning.beam_search import beam_search

START, END, PAD, VOCABULARY, LONGEST = 3, 1, 0, 5, 5


def chances_of(seed):
    """Build a random language: next-token logits for every sequence, ``(sequence) -> (vocabulary,)``."""

    def logits(sequence):
        generator = torch.Generator().manual_seed(hash((seed, *sequence)) % 2**40)
        return 2 * torch.randn(VOCABULARY, generator=generator)

    return logits


def best_by_trying_all(logits):
    """Return the answer with the highest mean log probability, counting the start token but not the end token."""
    best, score = None, -torch.inf
    for length in range(1, LONGEST):
        for rest in itertools.product(range(VOCABULARY), repeat=length):
            if END in rest[:-1] or (rest[-1] != END and length < LONGEST - 1):
                continue
            sequence, total = [START], 0.0
            for token in rest:
                total += torch.log_softmax(logits(tuple(sequence)), dim=0)[token].item()
                sequence.append(token)
            mean = total / (len(sequence) - (rest[-1] == END))
            if mean > score:
                best, score = sequence, mean
    return best


@pytest.mark.parametrize("seed", range(6))
def test_with_beams_enough_the_best_answer_is_found_and_padded(seed):
    languages = [chances_of(seed), chances_of(seed + 100)]
    beams = 300  # no answer is lost

    def step(sequences, order):
        return torch.stack([languages[i // beams](tuple(row)) for i, row in enumerate(sequences.tolist())])

    found = beam_search(
        step, 2, beams=beams, longest=LONGEST, start=START, end=END, pad=PAD, device=torch.device("cpu")
    ).tolist()
    expected = [best_by_trying_all(language) for language in languages]
    width = max(map(len, expected))
    assert found == [answer + [PAD] * (width - len(answer)) for answer in expected]
