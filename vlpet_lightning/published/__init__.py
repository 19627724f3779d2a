"""Published results beside a run's: the rows of its method and backbone, and what stands against comparing them.

A method is recognised by its recipe (units, sites and rules), never by a name; ``recipes.json`` is written from
``experiments/pet/`` by ``python -m tests.published.recipes``. Initial weights are no part of the method: a run whose
units start from others than the published ones is recognised, and not comparable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from vlpet_lightning.protocol import SHUFFLED, UNKNOWN, WHOLE, extractor_of, short, title_of
from vlpet_lightning.published.rows import ROWS, Row
from vlpet_lightning.tasks import IMAGE_TEXT, VIDEO_TEXT

FEATURES = {"image": ("RN101", "openai"), "video": ("ViT-B-32", "openai")}  # model and weights
TRAINING = ("lr", "weight_decay", "warmup_ratio", "dropout", "max_epochs", "gradient_clip_val", "batch_sizes")
INITIAL = ("start", "importance")  # settings of a unit's initial weights
EXTRA = ("limit_train", "limit_train_batches", "length_buckets")  # none of them in a published run


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """Return the recipe of each published row that is implemented here, by key."""
    return json.loads((files(__name__) / "recipes.json").read_text())


def units_of(placements: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the units at each site, independent of how placements are grouped, without their initial weights."""
    found: dict[str, list[Any]] = {}
    for placement in placements:
        unit = placement["unit"]
        settings = {name: value for name, value in unit.get("init_args", {}).items() if name not in INITIAL}
        for site in placement["at"]:
            found.setdefault(site, []).append({**unit, "init_args": settings})
    return found


def initial_weights(placements: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the units start from in words, by site; units that can only start fresh are left out."""
    found: dict[str, str] = {}
    for placement in placements:
        settings = placement["unit"].get("init_args", {})
        if "start" in settings:
            pruned = "pruned by measured importance" if settings.get("importance") else "pruned by magnitude"
            words = pruned if settings["start"] == "pruned" else str(settings["start"])
            found |= dict.fromkeys(placement["at"], words)
    return found


def benchmark_of(tasks: Sequence[str]) -> str | None:
    """Return ``image`` or ``video``; None for tasks of neither or both."""
    kinds = {name for name, known in (("image", IMAGE_TEXT), ("video", VIDEO_TEXT)) if set(tasks) & set(known)}
    return kinds.pop() if len(kinds) == 1 else None


def recognised(kind: str, recipe: Mapping[str, Any], tasks: Sequence[str]) -> str | None:
    """Return the key of the published method with a model's recipe, or None.

    Args:
        kind: Kind of the backbone.
        recipe: ``placements``, ``trainable``, ``peft`` and ``projector`` as in :attr:`VLModel.recipe`.
        tasks: Tasks of the run.
    """
    if recipe.get("peft") is not None or recipe.get("projector") is not None:
        return None
    benchmark = benchmark_of(tasks)
    mine = json.loads(json.dumps(units_of(recipe["placements"])))
    for key, theirs in recipes().items():
        same = theirs["kind"] == kind and theirs["benchmark"] == benchmark
        if same and units_of(theirs["placements"]) == mine and set(theirs["trainable"]) == set(recipe["trainable"]):
            return key
    return None


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """Return the published rows of a run's method and backbone, the paper's own first."""
    key = record.get("method", {}).get("published")
    return [row for row in ROWS if key is not None and row.key == key]


def objections(record: Mapping[str, Any], stage: str) -> list[str]:
    """Return the reasons why a run's scores cannot be compared with the published row of its method.

    Args:
        record: Protocol record of the run.
        stage: ``val`` or ``test``.
    """
    key = record.get("method", {}).get("published")
    if key not in recipes():
        return ["no published row has this method"]
    recipe = recipes()[key]
    return [
        *_protocol(record, stage),
        *_parts(record, stage),
        *_backbone(record, recipe),
        *_features(record, stage, recipe["benchmark"]),
        *_initial_weights(record, recipe),
        *_training(record, recipe),
    ]


def _protocol(record: Mapping[str, Any], stage: str) -> Iterator[str]:
    if record.get("protocol") != "original":
        yield f"protocol {title_of(record)}"
    if stage != "test":
        yield f"{stage} split, published scores are of the test split"


def _parts(record: Mapping[str, Any], stage: str) -> Iterator[str]:
    tasks = record.get("splits", {}).get(stage, {})
    if record.get("inputs", {}).get("shuffle_features"):
        yield SHUFFLED
    parts: dict[str, list[str]] = {}
    sizes: list[str] = []
    for task in record.get("tasks", []):
        found = tasks.get(task, {})
        if found.get("part", UNKNOWN) != WHOLE:
            parts.setdefault(f"part of the split: {found.get('part', UNKNOWN)}", []).append(task)
        elif found.get("published_samples") not in (None, found.get("samples")):
            sizes.append(f"{task} {found.get('samples'):,} instead of {found['published_samples']:,}")
    for part, names in parts.items():
        yield f"{part} ({', '.join(names)})"
    if sizes:
        yield f"samples of the {stage} split: {', '.join(sizes)}"


def _backbone(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    there, here = recipe["backbone"], record.get("backbone", {})
    if here.get("sizes") != there["sizes"]:
        yield f"backbone {here.get('name', UNKNOWN)} is not of the sizes of {there['name']}"


def _features(record: Mapping[str, Any], stage: str, benchmark: str) -> Iterator[str]:
    """Compare the extractor with the published one; a store that was converted from a tree does not know it."""
    wanted = FEATURES[benchmark]
    others: dict[str, None] = {}
    for task in record.get("splits", {}).get(stage, {}).values():
        made = (task.get("store") or {}).get("extractor") or {}
        found = (made.get("model", UNKNOWN), made.get("pretrained", UNKNOWN))
        if "tree" not in made and found != wanted:
            others[f"features of {extractor_of({'extractor': made})}, not of CLIP {wanted[0]}"] = None
    yield from others


def _initial_weights(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    mine = record["method"].get("initial_weights", {})
    for site, theirs in initial_weights(recipe["placements"]).items():
        if mine.get(site) != theirs:
            yield f"initial weights at {site} {mine.get(site, UNKNOWN)} instead of {theirs}"


def _training(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    mine, theirs = record.get("training", {}), recipe["training"]
    for name in TRAINING:
        if name in theirs and mine.get(name) != theirs[name]:
            yield f"{name} {short(mine.get(name))} instead of {short(theirs[name])}"
    for name in EXTRA:
        if mine.get(name):
            yield f"{name} {short(mine[name])}"
    prompts = record.get("items", {}).get("prompts")
    prompts = prompts if isinstance(prompts, Mapping) else {}
    for task, wanted in recipe.get("prompts", {}).items():
        if prompts.get(task, wanted) != wanted:
            yield f"prompt of {task} {prompts[task]!r} instead of {wanted!r}"
