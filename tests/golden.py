"""Golden parameter trees: every experiment's parameters by name, with shape and whether they are trained.

A tree in ``tests/testdata/trees`` lists the keys in a checkpoint of that experiment, so a changed tree is a change of
keys. After checking the differences reported by ``tests/test_golden.py``, rewrite the trees with::

    python -m tests.golden

A line is one parameter, or the same parameter of several equal layers: ``layers.{0..5}``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from vlpet_lightning.commands.params import model_of

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TREES = Path(__file__).parent / "testdata" / "trees"
LAYER = re.compile(r"(?<=\.)(layers|block|rungs)\.(\d+)(?=\.)")  # layers of BART and T5, and inputs of side layers
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Tree = dict[str, str]  # parameter: "3072x768 trained"


def experiments() -> dict[str, list[str]]:
    """Return the arguments of ``params`` for the overlay of every method, on its backbone."""
    found = {}
    for overlay in sorted((EXPERIMENTS / "pet").glob("*.yaml")):
        backbone = "t5" if overlay.stem.endswith("_t5") else "bart"
        files = [EXPERIMENTS / "image_text.yaml", EXPERIMENTS / "backbone" / f"{backbone}_base.yaml", overlay]
        found[overlay.stem] = [word for file in files for word in ("--config", str(file))]
    return found


def tree_of(args: list[str]) -> Tree:
    """Return the parameters of the model that ``fit`` would train with these arguments; tied ones once."""
    return {
        name: "x".join(map(str, p.shape)) + (" trained" if p.requires_grad else " frozen")
        for name, p in model_of(args).named_parameters()
    }


def collapse(tree: Tree) -> Tree:
    """Merge equal layers into one line; :func:`expand` is the inverse, except for the order."""
    runs: dict[tuple[str, str], list[list[int]]] = {}
    for name, said in sorted(tree.items(), key=lambda item: _layer(item[0])):
        kinds = runs.setdefault((LAYER.sub(r"\1.{}", name, count=1), said), [])
        if kinds and kinds[-1][1] == _layer(name) - 1:
            kinds[-1][1] += 1
        else:
            kinds.append([_layer(name)] * 2)
    return {
        template.replace("{}", str(first) if first == last else f"{{{first}..{last}}}"): said
        for (template, said), kinds in sorted(runs.items())
        for first, last in kinds
    }


def expand(lines: Tree) -> Tree:
    """Expand the lines of a file into a tree."""
    tree = {}
    for name, said in lines.items():
        layers = RANGE.search(name)
        indices = range(int(layers[1]), int(layers[2]) + 1) if layers else [0]
        tree |= {RANGE.sub(str(index), name): said for index in indices}
    return tree


def differences(wanted: Tree, found: Tree) -> list[str]:
    """Return the differences in the format of the files; empty if there are none."""
    gone = {name: said for name, said in wanted.items() if found.get(name) != said}
    new = {name: said for name, said in found.items() if wanted.get(name) != said}
    return [f"- {name}: {said}" for name, said in collapse(gone).items()] + [
        f"+ {name}: {said}" for name, said in collapse(new).items()
    ]


def read(name: str) -> Tree:
    """Read the golden tree of an overlay."""
    return expand(json.loads((TREES / f"{name}.json").read_text()))


def write() -> None:
    """Write the trees of all overlays, and remove trees without an overlay."""
    TREES.mkdir(parents=True, exist_ok=True)
    wanted = experiments()
    for stale in {path.stem for path in TREES.glob("*.json")} - set(wanted):
        (TREES / f"{stale}.json").unlink()
    for name, args in wanted.items():
        (TREES / f"{name}.json").write_text(json.dumps(collapse(tree_of(args)), indent=0) + "\n")
        sys.stdout.write(f"{name}\n")


def _layer(name: str) -> int:
    found = LAYER.search(name)
    return int(found[2]) if found else -1


if __name__ == "__main__":
    write()
