"""Training steps of this library against the plain way, full fine-tuning and LoRA of Hugging Face peft.

``python -m tests.benchmarks train [--kinds bart t5] [--methods VL-PET-large ...] [--batch 16] [--json]``

Samples of the scenarios ``vqa`` and ``caption`` have random lengths. This library's batches are length buckets of 50
batches; those of all others are drawn at random from the same samples. A round trains on 5 of each 50 batches, evenly
spaced in the order of their padded lengths, whose mean length is close to that of the 50. The ratio of times thus
estimates that of an epoch with ``length_buckets: 50`` to one without. The ratio of operations by the formula of
:mod:`vlpet_lightning.flops`, printed beside it, is what padding alone explains.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from tests.benchmarks.contenders import (
    FULL,
    IMAGE_TOKENS,
    METHODS,
    Pool,
    draw_pool,
    our_model,
    our_optimizer,
    plain_model,
    plain_optimizer,
    training_pass,
)
from tests.benchmarks.options import model_parser
from tests.benchmarks.pairs import has_fast_bf16, interleaved, timing_table
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.frozen_weights import cast_frozen

PLAIN, OURS = "plain loop", "ours"


@dataclass(frozen=True)
class Scenario:
    """Lengths of the samples.

    Args:
        name: Name in the table's title.
        text: See :func:`make_batches`.
        target: See :func:`make_batches`.
        pool: Number of batches that length buckets sort.
        batches: Number of them per round.
    """

    name: str
    text: int | str
    target: int | str
    pool: int = 1
    batches: int = 1


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("fixed-5", 20, 5),
        Scenario("fixed-20", 20, 20),
        Scenario("vqa", "vqa", 5, pool=50, batches=5),
        Scenario("caption", 5, "caption", pool=50, batches=5),
    )
}


def pools(kind: str, scenario: Scenario, batch: int) -> tuple[Pool, Pool]:
    """Return the same samples in random batches and in length buckets."""
    sizes = [batch] * scenario.pool
    random, bucketed = (
        draw_pool(kind, sizes, text=scenario.text, target=scenario.target, sort=sort)
        for sort in (False, scenario.pool > 1)
    )
    return random, bucketed


def by_formula(kind: str, method: str, scenario: Scenario, options: argparse.Namespace) -> dict[str, float]:
    """Return the operations of random batches divided by those of length buckets: of all batches, and of a round."""
    with torch.device("meta"):
        sizes = sizes_of(our_model(kind, method, tiny=options.tiny))

    def operations(pool: Pool, chosen: Sequence[int]) -> int:
        padded = pool.padded()
        return sum(
            training_flops(sizes, images=IMAGE_TOKENS, source=text + IMAGE_TOKENS, target=target)
            for text, target in (padded[number] for number in chosen)
        )

    random, bucketed = pools(kind, scenario, options.batch)
    every, count = range(scenario.pool), scenario.batches
    return {
        "formula": operations(random, every) / operations(bucketed, every),
        "formula_of_a_round": operations(random, random.spread(count)) / operations(bucketed, bucketed.spread(count)),
    }


def contenders(
    kind: str, method: str, scenario: Scenario, options: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    """Return the work of each contender, on batches of the same pool of samples; the plain loop comes first."""
    tiny, device = options.tiny, options.device
    random, bucketed = (
        pool.batches(pool.spread(scenario.batches), device=device) for pool in pools(kind, scenario, options.batch)
    )
    works: dict[str, Callable[[], None]] = {}

    def plain(name: str, **settings: Any) -> None:
        model = plain_model(kind, tiny=tiny, **settings).to(device)
        works[name] = training_pass(model.loss, plain_optimizer(model), random, device=device)

    def ours(name: str, frozen_dtype: torch.dtype | None = None, *, bf16: bool = False) -> None:
        model = our_model(kind, method, tiny=tiny).to(device)
        if frozen_dtype is not None:
            cast_frozen(model, frozen_dtype)
        works[name] = training_pass(model.loss, our_optimizer(model), bucketed, device=device, bf16=bf16)

    plain(PLAIN, method=method)
    ours(OURS)
    if options.bf16:
        ours(f"{OURS}, bf16", bf16=True)
        ours(f"{OURS}, bf16, frozen weights in bf16", torch.bfloat16, bf16=True)
    if options.full:
        plain(FULL, method=FULL)
    if options.peft and method == "LoRA":
        try:
            plain("LoRA of peft", method=method, peft=True)
        except ImportError:
            Console(stderr=True).print("LoRA of peft is left out: peft is not installed")
    return works


def parser() -> argparse.ArgumentParser:
    found = model_parser("train", __doc__, methods=list(METHODS))
    found.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None, help="default: where it is fast")
    found.add_argument("--full", action="store_true", help="add full fine-tuning")
    found.add_argument("--no-peft", dest="peft", action="store_false", help="omit LoRA of Hugging Face peft")
    return found


def main(words: Sequence[str] | None = None) -> None:
    options = parser().parse_args(words)
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json)
    if options.bf16 is None:
        options.bf16 = has_fast_bf16(options.device)
        if not options.bf16:
            console.print("bf16 is left out: this processor has no instructions for it (--bf16 measures it anyway)")
    results = []
    for kind in options.kinds:
        for method in options.methods:
            for name in options.scenarios:
                scenario = SCENARIOS[name]
                timings = interleaved(
                    contenders(kind, method, scenario, options),
                    samples=options.batch * scenario.batches,
                    rounds=options.rounds,
                    device=options.device,
                    console=console,
                )
                padding = by_formula(kind, method, scenario, options)
                times = [timing.as_dict() for timing in timings]
                results.append({"kind": kind, "method": method, "scenario": name, **padding, "times": times})
                if options.json:
                    continue
                console.print(timing_table(f"{kind}, {method}, {name}, batch {options.batch}", timings))
                if scenario.pool > 1:
                    console.print("by formula: {formula:.2f} (of a round: {formula_of_a_round:.2f})".format(**padding))
    if options.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
