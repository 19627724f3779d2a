"""Which rows of a report can be compared: protocol, splits, data and versions of the runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlpet_lightning.protocol import SHUFFLED, UNKNOWN, in_words, short, split_of, title_of
from vlpet_lightning.reports.groups import Group
from vlpet_lightning.reports.runs import STAGE

VERSIONS = "versions"  # a difference is worth a warning, but does not make scores incomparable
Facts = dict[str, Any]


def facts_of(record: Mapping[str, Any]) -> Facts:
    """Return what the scores of a record depend on besides method and training, by name."""
    if not record:
        return {"protocol record": UNKNOWN}
    tests = record.get("splits", {}).get(STAGE, {})
    trained = record.get("trained") or {}
    return {
        "protocol": title_of(record),
        "tasks": list(record.get("tasks", [])),
        "control": SHUFFLED if (record.get("inputs") or {}).get("shuffle_features") else "none",
        "split": {
            task: [split_of({"splits": record["splits"]}, STAGE, task), tests[task].get("samples")] for task in tests
        },
        "test data": _data(tests),
        "training data": _data((trained.get("splits") or {}).get("train", {})),
        "decoding": {task: in_words(how) for task, how in record.get("generation", {}).items()},
        VERSIONS: dict(record.get("versions", {})),
    }


def _data(splits: Mapping[str, Any]) -> dict[str, Any]:
    return {
        task: [found.get("annotations"), (found.get("store") or {}).get("checksum")] for task, found in splits.items()
    }


def differing(one: Facts, other: Facts) -> list[str]:
    """Return the names of the facts in which two records differ."""
    return [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]


def usual_facts(groups: Sequence[Group]) -> Facts:
    """Return the facts of most runs, which the others are compared with."""
    counts: dict[str, list[Facts]] = {}
    for group in groups:
        for run in group.runs:
            facts = facts_of(run.record)
            key = json.dumps({name: value for name, value in facts.items() if name != VERSIONS}, default=str)
            counts.setdefault(key, []).append(facts)
    return max(counts.values(), key=len)[0]


def reasons_against(group: Group, usual: Facts) -> list[str]:
    """Return the reasons why a group cannot be compared with the other rows; empty if it can."""
    found: dict[str, None] = {}
    for run in group.runs:
        facts = facts_of(run.record)
        for name in differing(usual, facts):
            if name != VERSIONS:
                found[_reason(name, usual.get(name), facts.get(name))] = None
        if len(run.records) > 1:
            found["tasks tested under different protocol records"] = None
    return list(found)


def _reason(name: str, usual: Any, here: Any) -> str:
    if name == "control" and here != "none":
        return f"control: {here}"
    if name in ("test data", "training data"):
        tasks = [task for task in here or {} if here[task] != (usual or {}).get(task)]
        return f"{name} of {', '.join(tasks)}" if tasks else name
    if isinstance(here, Mapping) and isinstance(usual, Mapping):
        parts = [
            f"{key} {short(here[key])}, usually {short(usual[key])}"
            for key in here
            if key in usual and here[key] != usual[key]
        ]
        if parts:
            return f"{name}: {'; '.join(parts)}"
    mine, theirs = (short(UNKNOWN if value is None else value) for value in (here, usual))
    return f"{name}: {mine}, usually {theirs}"


def warnings_of(groups: Sequence[Group], untested: Sequence[Any] = ()) -> list[str]:
    """Return what a reader of the table must know: differing versions, seeds, and runs that are left out."""
    found = list(_versions(groups))
    counts = {group.label: len(group.seeds) or len(group.runs) for group in groups}
    if len(set(counts.values())) > 1:
        most = max(counts.values())
        few = [f"{label} {count}" for label, count in counts.items() if count < most]
        found.append(f"numbers of seeds differ: most rows have {most}, {', '.join(few)}")
    for group in groups:
        if len(group.seeds) < len(group.runs) and group.seeds:
            found.append(f"{group.label}: {len(group.runs)} runs have only {len(group.seeds)} different seeds")
    if untested:
        shown = ", ".join(map(str, untested[:5])) + (f" and {len(untested) - 5} more" if len(untested) > 5 else "")
        found.append(f"{len(untested)} runs have no test scores and are left out: {shown}")
    return found


def _versions(groups: Sequence[Group]) -> Iterator[str]:
    by_package: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        for run in group.runs:
            versions = {**(run.record.get(VERSIONS) or {}), **_trained(run.record)}
            for package, version in versions.items():
                labels = by_package.setdefault(package, {}).setdefault(version, [])
                if group.label not in labels:
                    labels.append(group.label)
    for package, found in by_package.items():
        if len(found) > 1:
            usual = max(found, key=lambda version: len(found[version]))
            others = [f"{version} ({', '.join(labels)})" for version, labels in found.items() if version != usual]
            yield f"versions of {package} differ: usually {usual}, {'; '.join(others)}"


def _trained(record: Mapping[str, Any]) -> dict[str, str]:
    versions = (record.get("trained") or {}).get(VERSIONS) or {}
    same = versions == record.get(VERSIONS)
    return {} if same else {f"{package} in training": version for package, version in versions.items()}
