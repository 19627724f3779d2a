"""Cost of the throughput callback: steps of a small run with and without it, in turns, in one process.

``python -m tests.benchmarks.throughput [--steps 200]``
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console

from callbacks import Throughput
from tests.runs import Batches, make_batch, quiet_trainer, tiny_module
from tests.tiny import save_backbone

ROUNDS = 5


def seconds_a_step(folder: Path, steps: int, watched: bool) -> float:
    data = Batches([make_batch("gqa", 32, seed) for seed in range(steps)])
    trainer = quiet_trainer(folder, callbacks=[Throughput(50)] if watched else [])
    module = tiny_module(folder / "backbone")
    start = time.perf_counter()
    trainer.fit(module, data)
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(Path(folder) / "backbone")
        rounds = [[seconds_a_step(Path(folder), steps, watched) for watched in (False, True)] for _ in range(ROUNDS)]
    bare = statistics.median(without for without, _ in rounds)
    ratio = statistics.median(watched / without for without, watched in rounds)
    Console().print(f"{1000 * bare:.2f} ms a step without, ratio with over without {ratio:.3f} (median of {ROUNDS})")


if __name__ == "__main__":
    main()
