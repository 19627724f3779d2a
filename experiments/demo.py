"""``make demo``: render a world, extract features, pretrain a language model, train VL-PET-large and a blind control.

Every step is a command that can also be typed by hand; the demo prints each one and ends with a report. Independent
steps run in parallel, one thread each. The terminal shows the last line of their output, and log files have all of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vlpet_lightning.prediction_files import read_predictions

DATA = Path("data/demo")
PROGRAM = [sys.executable, "-m", "vlpet_lightning"]
CONFIGS = ["--config", "experiments/image_text.yaml", "--config", "experiments/demo.yaml"]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TAIL = 1600  # number of last bytes of a log that are searched for a progress bar

console = Console()


@dataclass
class Job:
    """Commands that run one after the other, with their output in a log file.

    Args:
        name: Name shown while the job runs.
        commands: Arguments of ``python -m vlpet_lightning``.
        log: Log file.
        threads: Number of threads of each command; by default that of the environment.
    """

    name: str
    commands: list[list[str]]
    log: Path
    threads: int | None = None
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    process: subprocess.Popen[bytes] | None = None
    output: IO[bytes] | None = None

    def step(self) -> bool:
        """Start the next command if the current one has ended; return whether the job is still running."""
        if self.process is not None and self.process.poll() is None:
            return True
        if self.process is not None and self.process.returncode:
            raise SystemExit(f"{self.name} failed, see {self.log}:\n{self.log.read_text(errors='replace')[-3000:]}")
        if not self.commands:
            self.seconds = self.seconds or time.monotonic() - self.started
            return False
        self.output = self.output or self.log.open("wb")
        self.process = subprocess.Popen(
            [*PROGRAM, *self.commands.pop(0)],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            # progress bars as on a terminal, narrow enough to fit next to the name
            env={**os.environ, "TTY_COMPATIBLE": "1", "COLUMNS": "90", "PYTHONUNBUFFERED": "1", **self.thread_limit()},
        )
        return True

    def thread_limit(self) -> dict[str, str]:
        """Return the environment variable that limits the threads."""
        return {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}

    def last_line(self) -> str:
        """Return the current line of the progress bar."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL))
            tail = ESCAPES.sub("", file.read().decode(errors="ignore"))
        lines = [line.strip() for line in re.split(r"[\r\n]+", tail)]
        bars = [line for line in lines if re.search(r"\d+%|\d+/\d+", line)]
        return (bars or [""])[-1]

    def row(self) -> tuple[str, str, str]:
        """Return name, seconds, and the progress bar or ``done``."""
        done = self.seconds is not None
        seconds = self.seconds if self.seconds is not None else time.monotonic() - self.started
        return self.name, f"{seconds:.0f} s", "done" if done else self.last_line()


def table(jobs: list[Job]) -> Table:
    """Table with one row per job."""
    grid = Table.grid(padding=(0, 2))
    for job in jobs:
        grid.add_row(*job.row())
    return grid


def run(*jobs: Job) -> None:
    """Run jobs in parallel and show their progress."""
    for job in jobs:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        for command in job.commands:
            console.print("python -m vlpet_lightning " + shlex.join(command), style="dim", soft_wrap=True, markup=False)
    try:
        with Live(table(list(jobs)), console=console, refresh_per_second=2, transient=True) as live:
            while sum(job.step() for job in jobs):  # step all jobs each time
                live.update(table(list(jobs)))
                time.sleep(0.5)
        console.print(table(list(jobs)))
    finally:  # also on Ctrl-C or after a failure: leave no process running
        for job in jobs:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()


def fit_and_test(
    version: str, *more: str, configs: Sequence[str] = CONFIGS, runs: str = "runs/demo"
) -> list[list[str]]:
    """Return the commands that train a model and test its last checkpoint."""
    common = [*configs, f"--trainer.logger.init_args.version={version}", *more]
    checkpoint = f"{runs}/{version}/checkpoints/last.ckpt"
    return [["fit", *common], ["test", *common, "--ckpt_path", checkpoint]]


def ask(folder: Path, data: Path = DATA) -> None:
    """Export the model and ask it two questions about a test image, the middle one of the VQA test split."""
    run_folder, out = folder / "vlpet_large", folder / "export"
    export = ["export", "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"), "--out", str(out)]
    run(Job("export", [export], folder / "logs" / "export.log"))
    records = read_predictions(run_folder / "predictions" / "test_vqa.json").records
    (image,) = records[len(records) // 2]["images"]
    for record in [record for record in records if record["images"] == [image]][:2]:
        command = ["ask", "--model", str(out), "--image", str(data / "images" / "COCO" / f"{image}.png")]
        command += ["--top", "3", record["text"]]
        console.print("python -m vlpet_lightning " + shlex.join(command), style="dim", soft_wrap=True)
        subprocess.run([*PROGRAM, *command], check=True)
        label = record["reference"]["label"]
        console.print(f"the truth: {max(label, key=label.get)}", highlight=False)


def prepare(logs: Path) -> None:
    """Render the world, extract the features of its images, and pretrain the language model."""
    images, features = str(DATA / "images"), str(DATA / "features")
    console.rule("1 of 4: a world of colored shapes, in the benchmark's formats")
    run(Job("world", [["data", "synthetic", "--out", str(DATA)]], logs / "world.log"))

    console.rule("2 of 4: features of its images; a language model that knows its words")
    encoder = ["--model", "experiments/clip/tiny_rn.json", "--pretrained", "null", "--pool", "null"]
    extract = ["data", "extract", "images", "--source", images, "--out", features, "--each_folder", "true", *encoder]
    pretrain = ["pretrain", "--text", str(DATA / "text"), "--out", str(DATA / "backbone")]
    run(Job("extract", [extract], logs / "extract.log"), Job("pretrain", [pretrain], logs / "pretrain.log"))


def main() -> None:
    """Run all steps and print the report; with ``--data``, only make the data."""
    parser = argparse.ArgumentParser(description="Train and test VL-PET-large on a rendered world.", allow_abbrev=False)
    parser.add_argument("--data", action="store_true", help="only make the world, its features and the language model")
    only_data = parser.parse_args().data
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores can be 20 times slower than one
    begun = time.monotonic()
    name = time.strftime("%Y%m%d-%H%M%S")
    folder = Path("runs/demo") / name
    logs = folder / "logs"
    prepare(logs)
    if only_data:
        console.print(f"{time.monotonic() - begun:.0f} s in all; written: {DATA}")
        return

    console.rule("3 of 4: VL-PET-large on four tasks, and a control whose features are shuffled between images")
    blind = fit_and_test(f"{name}/blind", "--data.init_args.shuffle_features=true")
    run(
        Job("VL-PET-large", fit_and_test(f"{name}/vlpet_large"), logs / "vlpet_large.log"),
        Job("blind control", blind, logs / "blind.log"),
    )

    console.rule("4 of 4: the report, and two questions about a picture")
    runs = [str(folder / "vlpet_large"), str(folder / "blind")]
    names = "VL-PET-large,blind control"
    report = ["report", *runs, "--names", names, "--out", str(folder / "report"), "--images", str(DATA / "images")]
    subprocess.run([*PROGRAM, *report], check=True)
    ask(folder)
    console.print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
