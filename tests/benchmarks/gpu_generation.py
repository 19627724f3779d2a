"""Beam and greedy search on a GPU: with and without CUDA graphs, against ``generate`` of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.benchmarks.contenders import KINDS, make_batches
from tests.benchmarks.generate import stock_generate
from vlpet_lightning.frozen_weights import cast_frozen

LENGTH = 20  # tokens of an answer


def recorded_generation(run: Any) -> None:
    """Tokens of recorded searches against those without graphs, in float32, over two shapes; weights move meanwhile."""
    if not run.cuda:
        run.say("generation graphs", skipped="needs a GPU")
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    for kind in KINDS:
        model = run.model(kind).eval()
        model.use_generation_graphs()
        for beams in (1, 5):
            run.check_time()
            equal = []
            for text, seed in ((20, 1), (20, 2), (11, 3), (20, 4), (11, 5), (20, 6), (20, 7), (11, 8)):
                batch = make_batches(kind, [32], text=text, seed=seed, device=run.device)[0]
                graphs, model.generation_graphs = model.generation_graphs, None
                expected = model.generate(batch, num_beams=beams, max_length=LENGTH)
                model.generation_graphs = graphs
                if seed == 4:  # recorded anew, because the weights move
                    model.to("cpu").to(run.device)
                found = model.generate(batch, num_beams=beams, max_length=LENGTH)
                equal.append(bool(torch.equal(expected, found)))
            recordings = [recording for recording in model.generation_graphs.recordings.values() if recording]
            run.say(
                f"generation graphs, {kind}, {beams} beams",
                equal=f"{sum(equal)} of {len(equal)}",
                recordings=len(recordings),
            )


def generation(run: Any) -> None:
    """Time of greedy and beam search: this library's, with graphs, and ``generate`` of transformers on the same model.

    In bf16, frozen weights are stored in bf16.
    """
    size = 8 if run.tiny else 256
    torch.backends.cuda.matmul.allow_tf32 = True
    for bf16 in (True, False):
        for kind in KINDS:
            model = run.model(kind).eval()
            if bf16:
                cast_frozen(model, torch.bfloat16)
            batch = run.batch(kind, size)
            for beams in (5, 1):
                run.check_time()
                figures = {}
                with run.autocast(bf16):
                    search = partial(model.generate, batch, num_beams=beams, max_length=LENGTH)
                    stock = run.median(partial(stock_generate, model, batch, beams, LENGTH), 3, 1)
                    ours = run.median(search, 3, 1)
                    if run.cuda:
                        model.use_generation_graphs()
                        graphs = run.median(search, 3, 2)  # the first call runs without graphs, the second records
                        figures = {"with_graphs": stock / graphs, "samples_per_s_with_graphs": size / graphs}
                        model.generation_graphs = None
                run.say(
                    f"generate {kind}, {beams} beams, {'bf16' if bf16 else 'tf32'}",
                    samples_per_s=size / ours,
                    against_stock=stock / ours,
                    **figures,
                )
