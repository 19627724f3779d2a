"""``make demo-vlm``: a small SmolVLM on a rendered world: VL-PET-large, LoRA, the projector alone and a blind control.

The language model is pretrained on text, the projector on captions with everything else frozen, and its own vision
tower extracts the features once. Uses the runner of ``demo.py``; every step is a command that can be typed by hand.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from demo import PROGRAM, Job, ask, console, fit_and_test, run

DATA = Path("data/demo_vlm")
RUNS = "runs/demo_vlm"
CONFIGS = [
    *("--config", "experiments/image_text.yaml", "--config", "experiments/protocol/vlm.yaml"),
    *("--config", "experiments/vlm/demo.yaml"),
]
LANGUAGE_MODEL = str(DATA / "language_model")
ALONE = min(2, os.cpu_count() or 1)  # threads of a job that runs alone


def prepare(logs: Path) -> None:
    """Render the world, pretrain the language model, and extract features with the model's vision tower."""
    console.rule("1 of 5: a world of colored shapes, and a language model that knows its words")
    run(Job("world", [["data", "synthetic", "--out", str(DATA)]], logs / "world.log"))
    pretrain = ["pretrain", "--kind", "smolvlm", "--text", str(DATA / "text"), "--out", LANGUAGE_MODEL]
    pretrain += ["--layers", "3", "--steps", "600", "--lr", "3e-3"]
    run(Job("pretrain", [pretrain], logs / "pretrain.log", threads=ALONE))

    console.rule("2 of 5: features of the images, the inputs of the projector, by the model's own tower")
    extract = ["data", "extract", "images", "--source", str(DATA / "images"), "--out", str(DATA / "features")]
    extract += ["--each_folder", "true", "--model", f"hf:{LANGUAGE_MODEL}"]
    run(Job("extract", [[*extract, "--features", "projector_input", "--pool", "null"]], logs / "extract.log"))


def align(folder: Path, name: str) -> str:
    """Train the projector on captions, and return the folder of the model with it."""
    console.rule("3 of 5: a projector that says what it sees, trained on captions")
    model = str(folder / "backbone")
    fit = ["fit", *CONFIGS, "--config", "experiments/vlm/pet/projector.yaml", "--data.init_args.tasks=[caption]"]
    fit += [f"--model.init_args.backbone={LANGUAGE_MODEL}", f"--trainer.logger.init_args.version={name}/projector"]
    fit += ["--trainer.max_epochs=2", "--trainer.limit_val_batches=0"]
    checkpoint = str(folder / "projector" / "checkpoints" / "last.ckpt")
    export = ["export", "--ckpt_path", checkpoint, "--merge", "--out", model]
    run(Job("projector", [fit, export], folder / "logs" / "projector.log", threads=ALONE))
    return model


def main() -> None:
    """Run all steps and print the report."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    name = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(RUNS) / name
    logs = folder / "logs"
    prepare(logs)
    model = align(folder, name)

    console.rule("4 of 5: VL-PET-large, LoRA, the projector alone, and VL-PET-large with features of other images")

    def commands(version: str, overlay: str, *more: str) -> list[list[str]]:
        configs = [*CONFIGS, "--config", f"experiments/vlm/pet/{overlay}.yaml", f"--model.init_args.backbone={model}"]
        return fit_and_test(f"{name}/{version}", *more, configs=configs, runs=RUNS)

    blind = commands("blind", "vlpet_large", "--data.init_args.shuffle_features=true")
    seeing = commands("vlpet_large", "vlpet_large")
    run(Job("VL-PET-large", seeing, logs / "vlpet_large.log"), Job("blind control", blind, logs / "blind.log"))
    run(
        Job("LoRA", commands("lora", "lora"), logs / "lora.log"),
        Job("projector alone", commands("projector_alone", "projector"), logs / "projector_alone.log"),
    )

    console.rule("5 of 5: the report, and two questions about a picture")
    runs = [str(folder / version) for version in ("vlpet_large", "lora", "projector_alone", "blind")]
    report = ["report", *runs, "--names", "VL-PET-large,LoRA,projector alone,blind control"]
    report += ["--out", str(folder / "report"), "--images", str(DATA / "images")]
    subprocess.run([*PROGRAM, *report], check=True)
    ask(folder, DATA)
    console.print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
