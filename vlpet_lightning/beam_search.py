"""Vectorised beam search with the bookkeeping of transformers 4.2.1 (generation_beam_search.py: BeamSearchScorer).

Releases 5.x differ in three ways. Of the hypotheses unfinished at the maximum length, they keep only those among the
first candidates, and normalise their score by one token less. They use another candidate to decide whether a sample is
done. They pad with the end token if the padding token is 0, as in T5.

All beams of a sample start from the same token, so that the first step has one row per sample. Samples whose search is
done leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# (sequences (R, t), rows of the last step to continue or None, samples of the last step to keep or None) -> logits
Step = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
NEVER = -1e9  # initial score of all beams but the first, which are copies of it
LEAVE = 4  # samples leave the batch when this fraction of it is done: one in four


@dataclass(frozen=True)
class SearchRules:
    """Settings of a beam search.

    Args:
        beams: Number of beams.
        longest: Maximum number of tokens, including the start token.
        start: Start token.
        end: End token.
        pad: Padding token.
        ngram: Length of token sequences that must not occur twice in an answer; 0 allows repetition.
        early_stopping: Stop a sample's search at its first ``beams`` finished hypotheses, even if others could score
            higher.
        force_end: The last possible token is the end token, at no cost.
        answers: Number of answers returned per sample, at most ``beams``.
        force_first: Token after the start token, at no cost; None leaves it to the model.
    """

    beams: int
    longest: int
    start: int
    end: int
    pad: int
    ngram: int = 0
    early_stopping: bool = False
    force_end: bool = False
    answers: int = 1
    force_first: int | None = None


def search_rules(config: Any) -> SearchRules:
    """Read the settings from a ``GenerationConfig`` of transformers."""
    return SearchRules(
        beams=config.num_beams,
        longest=config.max_length,
        start=config.decoder_start_token_id,
        end=config.eos_token_id,
        pad=config.pad_token_id,
        ngram=config.no_repeat_ngram_size or 0,
        early_stopping=config.early_stopping is True,
        force_end=config.forced_eos_token_id is not None,
        force_first=config.forced_bos_token_id,
    )


class SearchState(NamedTuple):
    """A search after a step, of ``B`` remaining samples.

    Args:
        running: ``(B, beams, longest)`` unfinished sequences, best first.
        scores: ``(B, beams)`` their log probabilities.
        ended: ``(B, beams, longest)`` best finished hypotheses, best first.
        ended_scores: ``(B, beams)`` their mean log probabilities; minus infinity where there is none.
        done: ``(B,)`` bool, whether the sample's search is done.
        continued: ``(B, beams)`` rows of the last step that the unfinished sequences continue; None before the first.
    """

    running: Tensor
    scores: Tensor
    ended: Tensor
    ended_scores: Tensor
    done: Tensor
    continued: Tensor | None

    def keep(self, samples: Tensor) -> SearchState:
        """Keep some of the samples."""
        return SearchState(*(None if tensor is None else tensor[samples] for tensor in self))  # type: ignore[arg-type]


def forbid_repeats(chances: Tensor, sequences: Tensor, ngram: int) -> None:
    """Set the tokens that would repeat an n-gram of their sequence to minus infinity, in place.

    Args:
        chances: ``(R, vocabulary)`` scores of the next token.
        sequences: ``(R, t)`` tokens so far.
        ngram: Length of the n-grams.
    """
    length = sequences.shape[1]
    if length < ngram:
        return
    seen = sequences.unfold(1, ngram, 1)  # (R, t - ngram + 1, ngram)
    follows = (seen[..., :-1] == sequences[:, None, length - ngram + 1 :]).all(dim=-1)
    limit = torch.where(follows, -torch.inf, torch.inf).to(chances.dtype)
    chances.scatter_reduce_(1, seen[..., -1], limit, "amin")


def _chances(logits: Tensor, sequences: Tensor, rules: SearchRules) -> Tensor:
    """Return the log probabilities ``(R, vocabulary)`` of the next token under the rules."""
    chances = F.log_softmax(logits.float(), dim=-1)
    if rules.force_first is not None and sequences.shape[1] == 1:
        chances.fill_(-torch.inf)[:, rules.force_first] = 0.0
    elif rules.force_end and sequences.shape[1] == rules.longest - 1:
        chances.fill_(-torch.inf)[:, rules.end] = 0.0
    elif rules.ngram:
        forbid_repeats(chances, sequences, rules.ngram)
    return chances


def _candidates(chances: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, beams and tokens ``(B, 2 * beams)`` of the best continuations.

    There are twice as many as beams, because at most half of them can end.
    """
    samples, beams = scores.shape
    best, token = chances.topk(min(2 * beams, chances.shape[1]))  # of each beam, then of each sample
    best = best.view(samples, -1, best.shape[1])  # in the first step, all beams have the same continuations
    token = token.view_as(best).expand(-1, beams, -1)
    top, index = (best + scores.unsqueeze(-1)).flatten(1).topk(2 * beams)
    return top, index // best.shape[2], token.flatten(1).gather(1, index)


def _rows(sequences: Tensor, index: Tensor) -> Tensor:
    return sequences.gather(1, index.unsqueeze(-1).expand(-1, -1, sequences.shape[-1]))


def start_search(samples: int, rules: SearchRules, device: torch.device) -> SearchState:
    """Return the state before the first step."""
    running = torch.full((samples, rules.beams, rules.longest), rules.pad, device=device)
    running[..., 0] = rules.start
    scores = torch.full((samples, rules.beams), NEVER, device=device)
    scores[:, 0] = 0.0
    none = torch.full_like(scores, -torch.inf)
    return SearchState(running, scores, running, none, torch.zeros_like(running[:, 0, 0], dtype=torch.bool), None)


def advance(step: Step, state: SearchState, kept: Tensor | None, length: int, rules: SearchRules) -> SearchState:
    """Append the best tokens to the running sequences, without reading any tensor's content.

    Args:
        step: See :func:`beam_search`.
        state: The search before the step.
        kept: Samples of the last step that remain, or None for all.
        length: Number of tokens of the running sequences.
        rules: Settings.
    """
    running, scores, ended, ended_scores, done, continued = state
    beams = rules.beams
    sequences = (running[:, :1] if length == 1 else running)[..., :length].flatten(0, 1)
    logits = step(sequences, None if continued is None else continued.flatten(), kept)
    top, beam, token = _candidates(_chances(logits, sequences, rules), scores)
    candidates = _rows(running, beam)
    candidates[..., length] = token
    ends = token == rules.end
    among_first = torch.arange(2 * beams, device=done.device) < beams
    counts = ends & among_first & ~done.unsqueeze(-1)
    ended, ended_scores = _best(ended, ended_scores, candidates, torch.where(counts, top / length, -torch.inf))
    alive = ends.int().argsort(dim=1, stable=True)[:, :beams]  # the best unfinished candidates, in order
    scores, running = top.gather(1, alive), _rows(candidates, alive)
    first = torch.arange(len(done), device=done.device).unsqueeze(-1)  # rows of the samples' first beams
    continued = first.expand(-1, beams) if length == 1 else first * beams + beam.gather(1, alive)
    worst = ended_scores[:, -1]  # minus infinity until there are enough hypotheses
    enough = worst.isfinite()
    done = done | (enough if rules.early_stopping else enough & (worst >= top[:, 0] / length))
    return SearchState(running, scores, ended, ended_scores, done, continued)


def _best(ended: Tensor, scores: Tensor, more: Tensor, more_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best of the hypotheses and of ``more``, and their scores."""
    scores, best = torch.cat([scores, more_scores], dim=1).topk(scores.shape[1])
    return _rows(torch.cat([ended, more], dim=1), best), scores


def best_answers(state: SearchState, length: int, rules: SearchRules) -> Tensor:
    """Return the ``(B, answers, longest)`` best hypotheses after a step; unfinished ones count if a search is not done.

    Args:
        state: The search after the step.
        length: Number of tokens before the step.
        rules: Settings.
    """
    unfinished = torch.where(state.done.unsqueeze(-1), -torch.inf, state.scores / (length + 1))
    return _best(state.ended, state.ended_scores, state.running, unfinished)[0][:, : rules.answers]


def trimmed(answers: Tensor, rules: SearchRules) -> Tensor:
    """Return ``(B, answers, longest)`` answers as ``(B * answers, length of the longest)``."""
    answers = answers.flatten(0, 1)
    is_end = answers[:, 1:] == rules.end
    lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 2, rules.longest)
    return answers[:, : int(lengths.max())]


@torch.no_grad()
def beam_search(step: Step, samples: int, rules: SearchRules, device: torch.device) -> Tensor:
    """Search for the answers with the highest mean log probability.

    Args:
        step: Returns the next-token logits of ``R`` sequences. In the first step there is one row per sample.
            Afterwards, row ``i * beams + j`` is beam ``j`` of the ``i``-th remaining sample; the step is told which
            row of the last step each row continues, and which samples of the last step remain (None for all).
        samples: ``B``.
        rules: Settings.
        device: Device of all tensors.

    Returns:
        ``(B * answers, at most longest)`` token ids, padded to the longest answer; the answers of a sample follow each
        other, best first.
    """
    state = start_search(samples, rules, device)
    answers = state.running[:, : rules.answers].clone()
    numbers = torch.arange(samples, device=device)  # of the remaining samples
    kept: Tensor | None = None
    for length in range(1, rules.longest):
        state = advance(step, state, kept, length, rules)
        done, kept = state.done, None
        finished = int(done.sum())
        if finished == len(done):
            break
        if finished * LEAVE >= len(done) and length < rules.longest - 1:
            answers[numbers[done]] = state.ended[done, : rules.answers]
            kept = (~done).nonzero().squeeze(1)
            state, numbers = state.keep(kept), numbers[kept]
    answers[numbers] = best_answers(state, length, rules)
    return trimmed(answers, rules)
