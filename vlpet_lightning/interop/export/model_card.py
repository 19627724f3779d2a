"""Model card of an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlpet_lightning.pet.serialization import positions_in_words
from vlpet_lightning.protocol import summary

HERE = "."  # name of a backbone stored in the export's own folder
HEADLINE = ("test/average", "val/average")
RECORDS = {"record": "training", "test_record": "test"}  # protocol records of a run, by their key


def factory_in_words(data: Any) -> str:
    """Format a config node in one line: ``VLPET(rank=96, gate=LargeGate(rank=96))``."""
    if isinstance(data, Mapping) and "class_path" in data:
        name = data["class_path"].rpartition(".")[2]
        settings = ", ".join(f"{key}={factory_in_words(value)}" for key, value in data.get("init_args", {}).items())
        return f"{name}({settings})"
    return str(data)


def in_words(recipe: Mapping[str, Any]) -> str:
    """Describe the method in one line."""
    parts = [
        f"{factory_in_words(entry['unit'])} at {', '.join(entry['at'])}{positions_in_words(entry)}"
        for entry in recipe["placements"]
    ]
    if recipe["peft"] is not None:
        parts.append(f"{factory_in_words(recipe['peft'])} of Hugging Face peft")
    return "; ".join([*parts, f"trained: {', '.join(recipe['trainable'])}"])


def _title(backbone: str) -> str:
    """Return the backbone's name for the heading; for a folder, its last component only."""
    path = Path(backbone)
    return path.name if path.is_absolute() or path.is_dir() else backbone


def _rows(cells: list[tuple[str, str]]) -> list[str]:
    return [f"| {name} | {value} |" for name, value in cells]


def _metric_rows(metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return ["No metrics: the run folder has no validation or test metrics."]
    order = sorted(metrics, key=lambda name: (not name.startswith("test/"), name not in HEADLINE, name))
    return ["| metric | value |", "|---|---:|", *_rows([(name, f"{metrics[name]:.2f}") for name in order])]


def _protocol_rows(protocol: Mapping[str, Any]) -> list[str]:
    """Return a section for each protocol record of the run."""
    lines: list[str] = []
    for key, stage in RECORDS.items():
        if key in protocol:
            lines += [f"## Protocol of the {stage}", "", "| | |", "|---|---|", *_rows(summary(protocol[key])), ""]
    return lines


LOADING = """## How to load

```python
from vlpet_lightning import load_pet

model = load_pet("DIR", backbone="{backbone}")
```

or in a config, with the settings of `pet_config.json`:

```yaml
model:
  init_args:
    pet_weights: DIR
```

Another backbone, or a damaged file, is refused. Loading runs no code of this folder.
"""


def model_card(record: Mapping[str, Any], notes: str = "", *, loadable: bool = True) -> str:
    """Return the text of an export's ``README.md``.

    Args:
        record: Contents of ``pet_config.json``.
        notes: Additional section.
        loadable: Whether :func:`vlpet_lightning.load_pet` can read the folder; if so, the card shows how.
    """
    backbone, counts, weights = record["backbone"], record["parameters"], record["weights"]
    name = "this folder" if backbone["name"] == HERE else backbone["name"]
    revision = f", revision `{backbone['revision']}`" if backbone["revision"] else ""
    facts = [
        (
            "backbone",
            f"this folder ({backbone['kind']}), with the units merged into it"
            if backbone["name"] == HERE
            else f"`{name}`{revision} ({backbone['kind']}), not in this folder",
        ),
        ("trained parameters", f"{counts['trainable']:,} of {counts['total']:,} ({counts['percent']:.2f} %)"),
        ("weights", f"{weights['tensors']} tensors, {weights['bytes'] / 1e6:.2f} MB"),
        (
            "images",
            "files, through the model's own vision tower"
            if (backbone.get("template") or {}).get("pixels")
            else f"features {record['model']['feature_dim']} wide, grid {record['model']['grid']}",
        ),
        ("start", record["model"]["start"]),
        ("mask_padding", str(record["model"]["mask_padding"]).lower()),
    ]
    facts += [
        (f"protocol: {key}", f"`{json.dumps(value)}`")
        for key, value in record["protocol"].items()
        if value is not None and key not in RECORDS
    ]
    facts += [(name, version) for name, version in record["versions"].items()]
    groups = [(name, f"{count['trainable']:,}") for name, count in counts["groups"].items() if count["trainable"]]
    lines = [
        "---",
        "library_name: vlpet_lightning",
        *([] if Path(backbone["name"]).is_dir() else [f"base_model: {name}"]),  # a folder is unknown to the hub
        "tags: [parameter-efficient-tuning, vision-and-language]",
        "---",
        "",
        f"# Parameter-efficient tuning of {_title(record.get('merged_from', name))}",
        "",
        record["method"],
        "",
        "| | |",
        "|---|---|",
        *_rows(facts),
        "",
        "| trained | parameters |",
        "|---|---:|",
        *_rows(groups),
        "",
        *_protocol_rows(record["protocol"]),
        "## Metrics of the run",
        "",
        *_metric_rows(record["metrics"]),
        "",
        *([notes.rstrip(), ""] if notes else []),
        *([LOADING.format(backbone="DIR" if backbone["name"] == HERE else name)] if loadable else []),
    ]
    return "\n".join(lines)
