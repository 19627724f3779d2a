"""Vectorised beam search with the bookkeeping of transformers 4.2.1 (generation_beam_search.py: BeamSearchScorer).

Releases 5.x differ in three ways. Of the hypotheses unfinished at the maximum length, they keep only those among the
first candidates, and normalise their score by one token less. They use another candidate to decide whether a sample is
done. They pad with the end token if the padding token is 0, as in T5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

# (sequences (R, t), row order to apply to the cache of the last step, or None) -> logits (R, vocabulary)
Step = Callable[[Tensor, Tensor | None], Tensor]
NEVER = -1e9  # initial score of all beams but the first, which are copies of it


class _Hypotheses:
    """The best finished hypotheses of each sample.

    Args:
        like: ``(B, beams, longest)`` sequences that determine shape, dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self.sequences = like.clone()
        self.scores = torch.full(like.shape[:2], -torch.inf, device=like.device)

    def add(self, sequences: Tensor, scores: Tensor) -> None:
        """Add hypotheses and keep the best."""
        self.scores, best = torch.cat([self.scores, scores], dim=1).topk(self.scores.shape[1])
        index = best.unsqueeze(-1).expand(-1, -1, sequences.shape[-1])
        self.sequences = torch.cat([self.sequences, sequences], dim=1).gather(1, index)

    @property
    def worst(self) -> Tensor:
        """``(B,)`` worst score kept; minus infinity until there are enough hypotheses."""
        return self.scores[:, -1]


def _rows(sequences: Tensor, index: Tensor) -> Tensor:
    return sequences.gather(1, index.unsqueeze(-1).expand(-1, -1, sequences.shape[-1]))


@torch.no_grad()
def beam_search(
    step: Step, samples: int, *, beams: int, longest: int, start: int, end: int, pad: int, device: torch.device
) -> Tensor:
    """Search for the answers with the highest mean log probability.

    Args:
        step: Returns the next-token logits of ``R = samples * beams`` sequences; row ``i * beams + j`` is beam ``j``
            of sample ``i``.
        samples: ``B``.
        beams: Number of beams.
        longest: Maximum number of tokens, including the start token.
        start: Start token.
        end: End token.
        pad: Padding token.
        device: Device of all tensors.

    Returns:
        ``(B, at most longest)`` token ids, padded to the longest answer.
    """
    running = torch.full((samples, beams, longest), pad, device=device)
    running[..., 0] = start
    scores = torch.full((samples, beams), NEVER, device=device)
    scores[:, 0] = 0.0
    ended = _Hypotheses(running)
    done = torch.zeros(samples, dtype=torch.bool, device=device)
    among_first = torch.arange(2 * beams, device=device) < beams
    first_row = torch.arange(samples, device=device).unsqueeze(-1) * beams
    order: Tensor | None = None
    for length in range(1, longest):
        chances = F.log_softmax(step(running.flatten(0, 1)[:, :length], order).float(), dim=-1)
        vocabulary = chances.shape[-1]
        # twice as many candidates as beams: at most half of them can end
        top, index = (chances + scores.flatten().unsqueeze(-1)).view(samples, -1).topk(2 * beams)
        beam, token = index // vocabulary, index % vocabulary
        candidates = _rows(running, beam)
        candidates[..., length] = token
        ends = token == end
        counts = ends & among_first & ~done.unsqueeze(-1)
        ended.add(candidates, torch.where(counts, top / length, -torch.inf))
        alive = ends.int().argsort(dim=1, stable=True)[:, :beams]  # the best unfinished candidates, in order
        scores, running = top.gather(1, alive), _rows(candidates, alive)
        order = (beam.gather(1, alive) + first_row).flatten()
        done |= ended.worst.isfinite() & (ended.worst >= top[:, 0] / length)
        if bool(done.all()):
            break
    ended.add(running, torch.where(done.unsqueeze(-1), -torch.inf, scores / (length + 1)))
    answers = ended.sequences[:, 0]
    is_end = answers[:, 1:] == end
    lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 2, longest)
    return answers[:, : int(lengths.max())]


def search(lm: Any, states: Tensor, mask: Tensor, cache: Any, *, beams: int, longest: int) -> Tensor:
    """Run beam search from encoder states, with a cached decoder step per token.

    Args:
        lm: Encoder-decoder model of transformers.
        states: ``(B, S, d)`` encoder states.
        mask: ``(B, S)`` bool, true on real positions.
        cache: Cache with ``B * beams`` rows of keys and values that precede the decoder's tokens, or None.
        beams: Number of beams.
        longest: Maximum number of tokens, including the start token.

    Returns:
        As :func:`beam_search`.
    """
    rows, device = len(states), states.device
    states = states.repeat_interleave(beams, dim=0)
    mask = mask.repeat_interleave(beams, dim=0)

    def step(sequences: Tensor, order: Tensor | None) -> Tensor:
        nonlocal cache
        if order is not None:
            cache.reorder_cache(order)
        output = lm(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=sequences[:, -1:],  # all earlier tokens are in the cache
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        return output.logits[:, -1]

    return beam_search(
        step,
        rows,
        beams=beams,
        longest=longest,
        start=lm.config.decoder_start_token_id,
        end=lm.config.eos_token_id,
        pad=lm.config.pad_token_id,
        device=device,
    )
