"""Sweeps at demo size: the same points on the small model and the rendered world of ``make demo``.

The demo's VL-PET-large has a third of the ranks of BART-base's and twice its learning rate. Both ratios are applied to
every point, so that methods keep the proportions of their published settings. That of decoder-only models has the ranks
of experiments/vlm/pet/ and ten times the learning rate.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from vlpet_lightning.overlays import KEY, OPTION, overlays_of, read_config
from vlpet_lightning.sweeps.plan import ARGS_FILE, Point, Sweep, SweepError


class Demo(NamedTuple):
    """Demo size of an experiment.

    Args:
        overlay: Its config.
        maker: Command that makes its data.
        shrink: Divisor of the inner widths of units.
        faster: Factor of the learning rate.
    """

    overlay: str
    maker: str
    shrink: int
    faster: int


DEMOS = {  # by a config among those of a sweep's command; the last one counts
    "experiments/image_text.yaml": Demo("experiments/demo.yaml", "make demo-data", shrink=3, faster=2),
    "experiments/video_text.yaml": Demo("experiments/demo_video.yaml", "make demo-video", shrink=3, faster=2),
    "experiments/vlm/smolvlm_256m.yaml": Demo("experiments/vlm/demo.yaml", "make demo-vlm", shrink=1, faster=10),
}
RARER = "experiments/sweeps/overlays/demo.yaml"  # validates less often
INNER = frozenset({"rank", "value_rank", "hidden", "embedding", "r"})  # inner widths of units
FACTORS = {"alpha": "rank", "lora_alpha": "r"}  # their ratio scales the update, and is kept


def at_demo_size(sweep: Sweep) -> Sweep:
    """Return a sweep whose points run at demo size.

    The demo's overlay is inserted before each point. A point lists all of its settings: its overlays are merged into
    it, inner widths of units are divided, and its learning rate is multiplied, as in the demo's own config.

    Raises:
        SweepError: If the sweep's command names no experiment that has a demo, or the demo's data is missing.
        FileNotFoundError: If an overlay of a point does not exist.
    """
    named = [word for word in sweep.words if word in DEMOS]
    if not named:
        raise SweepError(f"{sweep.path} has no demo size: its command must name {' or '.join(DEMOS)}")
    demo = DEMOS[named[-1]]
    missing = [name for name in _data(demo.overlay) if not Path(name).exists()]
    if missing:
        raise SweepError(f"the demo's data is missing ({', '.join(missing)}): make it by `{demo.maker}`")
    place = sweep.words.index(ARGS_FILE) - 1
    words = [*sweep.words[:place], OPTION, demo.overlay, OPTION, RARER, *sweep.words[place:]]
    points = [_small(point, demo) for point in sweep.points]
    return replace(sweep, name=f"{sweep.name}-demo", words=words, points=points)


def _data(demo: str) -> list[str]:
    content = read_config(Path(demo))
    return [content["model"]["init_args"]["backbone"], f"{content['data']['init_args']['root']}/features"]


def _small(point: Point, demo: Demo) -> Point:
    named = point.get(KEY) or []
    overlays = [named] if isinstance(named, str) else named
    files = [file for overlay in overlays for file in (*overlays_of(Path(overlay)), overlay)]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"no config file {file}, an overlay of a point: relative paths start from {Path.cwd()}"
            )
    parts = [read_config(Path(file)) for file in files]
    parts = [{key: value for key, value in part.items() if key != KEY} for part in [*parts, point]]
    merged: Point = OmegaConf.to_container(OmegaConf.merge(*parts))  # type: ignore[assignment]
    if overlays:
        merged[KEY] = overlays  # shown in results; the point's own settings override them
    settings = merged.get("model", {}).get("init_args", {})
    for name in ("placements", "peft"):
        if name in settings:
            settings[name] = shrunk(settings[name], demo.shrink)
    if "lr" in settings:
        settings["lr"] *= demo.faster
    return merged


def shrunk(value: Any, divisor: int) -> Any:
    """Divide the inner widths of units, in placements as plain data.

    >>> shrunk({"class_path": "vlpet_lightning.pet.LoRA", "init_args": {"rank": 128, "alpha": 32, "dropout": 0.1}}, 3)
    {'class_path': 'vlpet_lightning.pet.LoRA', 'init_args': {'rank': 42, 'alpha': 10.5, 'dropout': 0.1}}
    """
    if isinstance(value, list):
        return [shrunk(one, divisor) for one in value]
    if not isinstance(value, Mapping):
        return value
    found = {name: shrunk(inner, divisor) for name, inner in value.items()}
    if "class_path" in found:
        settings = {**_default_widths(found["class_path"]), **(found.get("init_args") or {})}
        found |= {"init_args": _narrowed(settings, divisor)} if settings else {}
    return found


def _default_widths(class_path: str) -> dict[str, Any]:
    """Return the inner widths that a class has by default, which a config may leave out."""
    module, _, name = class_path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    defaults = {name: found.default for name, found in parameters.items() if name in INNER}
    return {name: default for name, default in defaults.items() if isinstance(default, int)}


def _narrowed(settings: Mapping[str, Any], divisor: int) -> dict[str, Any]:
    found = dict(settings)
    for name in INNER & settings.keys():
        if isinstance(found[name], int) and found[name]:  # 0 leaves a part out
            found[name] = max(1, found[name] // divisor)
    for factor, width in FACTORS.items():
        if settings.get(factor) and settings.get(width):
            found[factor] = settings[factor] * found[width] / settings[width]
    return found
