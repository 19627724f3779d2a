"""The ``sweep`` command: run the points of a Weights & Biases sweep file without its server."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import track

from vlpet_lightning.sweeps.demo import at_demo_size
from vlpet_lightning.sweeps.folder import SweepFolder, points_of
from vlpet_lightning.sweeps.local import run_here
from vlpet_lightning.sweeps.plan import ARGS_FILE, Sweep, read_sweep
from vlpet_lightning.sweeps.slurm import head_lines, job_at_work, submit

LOG_LINES = 3  # shown below the table for each failed point


def sweep(args: Sequence[str]) -> None:
    """Run the unfinished points of a sweep and show the results.

    Args:
        args: The file and options; ``--help`` shows them.

    Raises:
        FileNotFoundError: If the sweep file or the --sbatch file does not exist.
        SweepError: If the file cannot be run here or has changed since the sweep started, or SLURM refuses the job.
        SystemExit: With 1 if points have failed.
    """
    options = _options(args)
    lines = head_lines(options.sbatch)
    wanted = read_sweep(options.file, count=options.count, seed=options.seed)
    if options.demo:
        wanted = at_demo_size(wanted)
    path = options.out or Path("runs/sweeps") / wanted.slug
    console = Console()
    for note in wanted.notes:
        console.print(f"note: {note}")
    if options.dry_run:
        _parse_all(wanted)
        for number, point in enumerate(wanted.points):
            console.print(f"{number:04d} {point}", soft_wrap=True, highlight=False)
        console.print(f"{len(wanted.points)} points, all of them valid; nothing was run")
        return
    if points_of(path) < len(wanted.points):
        _parse_all(wanted)  # before any file is written
    folder = SweepFolder(path, wanted, options.test)
    try:
        with folder.locked() as lock:
            numbers, job = folder.todo(options.retry_failed), job_at_work(folder)
            if job is not None:
                folder.running = job[1]
                console.print(f"job {job[0]} has waiting or running points: nothing was started")
            elif not numbers:
                console.print(
                    "every point has finished" + ("" if options.retry_failed else "; --retry-failed runs failed ones")
                )
            elif options.launcher == "slurm":
                console.print(submit(folder, numbers, at_once=options.max_parallel, lines=lines), soft_wrap=True)
            else:
                places = devices_of_points(options.max_parallel)
                run_here(folder, numbers, lock=lock, at_once=options.max_parallel, devices=places, console=console)
    finally:
        folder.write_results()
        console.print(folder.table())
        _failures(folder, console)
    if any(folder.state(number) == "failed" for number in range(len(wanted.points))):
        raise SystemExit(1)


def _parse_all(wanted: Sweep) -> None:
    """Parse every point, so that a misspelt setting stops the sweep before its first run."""
    from vlpet_lightning.cli import parse

    with TemporaryDirectory() as folder:
        file = Path(folder) / "args.json"
        for point in track(wanted.points, description=f"parsing {wanted.name}", transient=True):
            file.write_text(json.dumps(point))
            parse([str(file) if word == ARGS_FILE else word for word in wanted.words])


def devices_of_points(at_once: int) -> list[str]:
    """Return the GPUs to distribute points over, as ``CUDA_VISIBLE_DEVICES`` names them; empty for one at a time."""
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")  # on a shared machine the other GPUs may be in use
    names = [name.strip() for name in given.split(",")] if given else [str(number) for number in range(count)]
    return names[:count] if at_once > 1 and count > 1 else []


def _failures(folder: SweepFolder, console: Console) -> None:
    for number in range(len(folder.sweep.points)):
        if folder.state(number) == "failed":
            log = folder.of(number) / "log.txt"
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LOG_LINES:]
            console.print(f"{number:04d} failed, {log}:", style="bold red", soft_wrap=True)
            for line in last:
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _options(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlpet_lightning sweep",
        description="Run the points of a W&B sweep file (grid or random) without W&B's server. Repeating the command "
        "resumes the sweep: finished points are kept, interrupted ones resume from their checkpoints.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="the sweep, such as experiments/sweeps/granularity.yaml")
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="where points run; default: local"
    )
    parser.add_argument("--max-parallel", type=_positive, default=1, metavar="N", help="points at a time; default: 1")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the sweep's folder; default: runs/sweeps/NAME")
    parser.add_argument("--count", type=_positive, metavar="N", help="number of points; required for a random sweep")
    parser.add_argument("--seed", type=int, default=0, help="seed of a random sweep; default: 0")
    parser.add_argument("--retry-failed", action="store_true", help="run failed points again")
    parser.add_argument("--sbatch", type=Path, metavar="FILE", help="#SBATCH lines for --launcher slurm")
    parser.add_argument(
        "--test",
        nargs="?",
        const="last",
        choices=("last", "best"),
        help="test each point after its training: its last checkpoint, or the best on validation; default: last",
    )
    parser.add_argument(
        "--demo", action="store_true", help="run the points at demo size, on the world of `make demo-data`"
    )
    parser.add_argument("--dry-run", action="store_true", help="parse and list the points, run nothing")
    return parser.parse_args(args)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text!r}")
    return int(text)
