"""Write the recipes of the published rows from ``experiments/``: ``python -m tests.published_recipes``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.cli import ModelOnly
from vlpet_lightning.pet.serialization import placements_to_plain
from vlpet_lightning.published.rows import ROWS
from vlpet_lightning.tasks import TASKS

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
FILE = ROOT / "vlpet_lightning" / "published" / "recipes.json"
NOT_HERE = {"lst/t5", "coeff_tuning_dora/bart"}  # methods without an implementation
NAMES = {"bart": "facebook/bart-base", "t5": "t5-base"}
# video baselines: the learning rates of the published rows are not known
VIDEO_UNKNOWN = {"vl_adapter/video", "lora/video", "full/video"}


def words_of(key: str) -> list[str]:
    """Return the arguments of the shipped experiment of a row."""
    method, _, kind = key.partition("/")
    base = EXPERIMENTS / ("video_text.yaml" if kind == "video" else "image_text.yaml")
    paths = [base, *([EXPERIMENTS / "backbone" / "t5_base.yaml"] if kind == "t5" else [])]
    return [word for path in [*paths, EXPERIMENTS / "pet" / f"{method}.yaml"] for word in ("--config", str(path))]


def recipe_of(key: str) -> dict[str, Any]:
    """Return the recipe of a row, from its shipped experiment."""
    cli = ModelOnly(words_of(key), run=False)
    module, data, trainer = cli.model, cli.config.data.init_args, cli.config.trainer
    tasks = {name: TASKS[name] for name in data.tasks}
    benchmark = "video" if key.endswith("/video") else "image"
    known = BACKBONES[module.kind].known[NAMES[module.kind]]
    training = {name: getattr(module, name) for name in ("lr", "weight_decay", "warmup_ratio", "dropout")}
    training |= {name: trainer[name] for name in ("max_epochs", "gradient_clip_val")}
    training["batch_sizes"] = {name: spec.batch_size(data.batch_size) for name, spec in tasks.items()}
    prompts = {name: (data.prompts or {}).get(name, spec.prompt) for name, spec in tasks.items()}
    return {
        "benchmark": benchmark,
        "kind": module.kind,
        "backbone": {
            "name": NAMES[module.kind],
            "sizes": {name: value for name, value in sorted(known.items()) if name != "vocab_size"},
        },
        "placements": placements_to_plain(module.placements),
        "trainable": list(module.rules),
        "training": {} if key in VIDEO_UNKNOWN else training,
        **({} if key in VIDEO_UNKNOWN else {"prompts": prompts}),
    }


def all_recipes() -> dict[str, Any]:
    """Return the recipes of all rows as JSON gives them back."""
    keys = dict.fromkeys(row.key for row in ROWS if row.key not in NOT_HERE)
    return json.loads(json.dumps({key: recipe_of(key) for key in keys}))


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_recipes(), indent=1) + "\n")
