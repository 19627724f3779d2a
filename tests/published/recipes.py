"""Write the recipes of the published rows from ``experiments/``: ``python -m tests.published.recipes``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.module import VLModule
from vlpet_lightning.pet.serialization import placements_from_plain, placements_to_plain
from vlpet_lightning.published.rows import ROWS
from vlpet_lightning.tasks import TASKS

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
FILE = ROOT / "vlpet_lightning" / "published" / "recipes.json"
NOT_HERE = {"coeff_tuning_dora/bart"}  # methods without an implementation
NAMES = {"bart": "facebook/bart-base", "t5": "t5-base"}
KINDS = {"vlpet_lightning.VLBart": "bart", "vlpet_lightning.VLT5": "t5"}
OF_THE_MODULE = ("lr", "weight_decay", "warmup_ratio", "dropout")
OF_THE_TRAINER = ("max_epochs", "gradient_clip_val")
# published with units that start from measured importance; the shipped experiments work without its file
MEASURED = {"lst_t5/t5"}
# of the video baselines, the published settings of training are not known
UNKNOWN_TRAINING = {"vl_adapter/video", "lora/video", "full/video"}


def configs_of(key: str) -> list[Path]:
    """Return the config files of the shipped experiment of a row, the base first."""
    method, _, kind = key.partition("/")
    base = EXPERIMENTS / ("video_text.yaml" if kind == "video" else "image_text.yaml")
    backbone = [EXPERIMENTS / "backbone" / "t5_base.yaml"] if kind == "t5" else []
    return [base, *backbone, EXPERIMENTS / "pet" / f"{method}.yaml"]


def merged(one: Any, other: Any, name: str = "") -> Any:
    """Merge configs as the command line does: settings one by one, lists and prompts as a whole."""
    if name == "prompts" or not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return other
    return {
        key: merged(one[key], other[key], key) if key in one and key in other else other.get(key, one.get(key))
        for key in {**one, **other}
    }


def config_of(key: str) -> dict[str, Any]:
    """Return the merged config of a row's experiment."""
    found: dict[str, Any] = {}
    for path in configs_of(key):
        found = merged(found, yaml.safe_load(path.read_text()))
    return found


def recipe_of(key: str) -> dict[str, Any]:
    """Return the recipe of a row, from its shipped experiment."""
    config = config_of(key)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    defaults = inspect.signature(VLModule.__init__).parameters
    kind = KINDS[config["model"]["class_path"]]
    tasks = {name: TASKS[name] for name in data["tasks"]}
    training = {name: model.get(name, defaults[name].default) for name in OF_THE_MODULE}
    training |= {name: config["trainer"][name] for name in OF_THE_TRAINER}
    training["batch_sizes"] = {name: spec.batch_size(data["batch_size"]) for name, spec in tasks.items()}
    known = dict(sorted(BACKBONES[kind].known[NAMES[kind]].items()))
    prompts = {name: data.get("prompts", {}).get(name, spec.prompt) for name, spec in tasks.items()}
    placements = placements_to_plain(placements_from_plain(model["placements"]))
    if key in MEASURED:
        placements[0]["unit"]["init_args"]["importance"] = "measured"
    return {
        "benchmark": "video" if key.endswith("/video") else "image",
        "kind": kind,
        "backbone": {"name": NAMES[kind], "sizes": {name: v for name, v in known.items() if name != "vocab_size"}},
        "placements": placements,
        "trainable": model["trainable"],
        "training": {} if key in UNKNOWN_TRAINING else training,
        "prompts": {} if key in UNKNOWN_TRAINING else prompts,
    }


def all_recipes() -> dict[str, Any]:
    """Return the recipes of all rows as JSON gives them back."""
    keys = dict.fromkeys(row.key for row in ROWS if row.key not in NOT_HERE)
    return json.loads(json.dumps({key: recipe_of(key) for key in keys}))


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_recipes(), indent=1) + "\n")
