"""``make demo-video``: render clips, pretrain a language model, train VL-PET-large and a blind control, print a report.

Uses the runner of ``demo.py``; every step is a command that can also be typed by hand.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from demo import PROGRAM, Job, console, fit_and_test, run

DATA = Path("data/demo_video")
RUNS = "runs/demo_video"
CONFIGS = ["--config", "experiments/video_text.yaml", "--config", "experiments/demo_video.yaml"]


def main() -> None:
    """Run all steps and print the report."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    name = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(RUNS) / name
    logs = folder / "logs"

    console.rule("1 of 4: a world of short clips, in the formats of the VALUE benchmark, and features of its frames")
    run(Job("world", [["data", "synthetic-video", "--out", str(DATA)]], logs / "world.log"))

    console.rule("2 of 4: a language model that knows its words")
    pretrain = ["pretrain", "--text", str(DATA / "text"), "--out", str(DATA / "backbone")]
    run(Job("pretrain", [pretrain], logs / "pretrain.log"))

    console.rule("3 of 4: VL-PET-large on four tasks, and a control whose features are shuffled between clips")
    seeing = fit_and_test(f"{name}/vlpet_large", configs=CONFIGS, runs=RUNS)
    blind = fit_and_test(f"{name}/blind", "--data.init_args.shuffle_features=true", configs=CONFIGS, runs=RUNS)
    run(Job("VL-PET-large", seeing, logs / "vlpet_large.log"), Job("blind control", blind, logs / "blind.log"))

    console.rule("4 of 4: the report")
    runs = [str(folder / "vlpet_large"), str(folder / "blind")]
    names = "VL-PET-large,blind control"
    report = ["report", *runs, "--names", names, "--out", str(folder / "report")]
    subprocess.run([*PROGRAM, *report, "--images", str(DATA / "images")], check=True)
    console.print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
