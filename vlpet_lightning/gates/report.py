"""Files of a report on gates: ``gates.json``, ``gates.csv``, figures and ``index.html``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.gates import figures
from vlpet_lightning.gates.page import Block, Cell, Picture, Section, Table, Text, page
from vlpet_lightning.gates.results import Result, differences, document
from vlpet_lightning.gates.statistics import NEAR, SATURATED

READING = (
    "G is the factor by which a gate multiplies its branch: the sublayer's output with the adapter's update. 0 closes "
    "the branch, 1 leaves it as it is. A scale of the unit on the whole branch (0.3 in the T5 recipe) multiplies the "
    "branch as well and is not part of G. In the protocol `original` every sigmoid gate starts near 0.5, in "
    "`corrected` every gate starts at 1.",
    f"`near 0` and `near 1` are the shares of factors less than {NEAR} away from 0 and from 1; `saturated` is the "
    f"share in the outer {SATURATED:.0%} of the gate's range, at either end (empty for a gate without limits). `text` "
    "includes the task prompt's words, `prompt` are the tokens of prompt tuning, and `all` is every real position, "
    "without padding.",
)
GRANULARITY = (
    "The variance of G over tokens and channels, divided by the granularity that could express it: differences between "
    "the means of samples (the small gate has no others), between tokens of a sample (middleX), between channels "
    "(middleY), and what only a factor per token and channel can express (large)."
)


class Writer:
    """Writes the files of a report into a folder.

    Args:
        folder: Existing folder.
        split: Name of the split.
        advance: Called with the name of each file that is written, for a progress bar.
    """

    def __init__(self, folder: Path, split: str, advance: Callable[[str], None] = lambda name: None) -> None:
        self.folder, self.split, self.advance = folder, split, advance
        self.written: list[Path] = []

    def report(
        self,
        results: Sequence[Result],
        pictures: Mapping[str, Mapping[str, Sequence[Path]]],
        *,
        limit: int | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Write everything.

        Args:
            results: One checkpoint, or two that are compared.
            pictures: Image files of examples, by task and question id.
            limit: Largest number of samples per task that was asked for.
            notes: Lines shown at the top of the page.
        """
        content = json.dumps(document(list(results), self.split, limit), indent=1, allow_nan=False)
        self._write("gates.json", content + "\n")
        self._write("gates.csv", as_csv(results))
        sections = [Section("Granularity", [Text(GRANULARITY), *self._variation(results)])]
        if len(results) == 2:
            sections.insert(0, self._comparison(*results))
        tasks = dict.fromkeys(task for result in results for task in result.tasks)
        sections += [Section(task, list(self._task(results, task, pictures.get(task, {})))) for task in tasks]
        sections.append(Section("All numbers", [_numbers(result) for result in results]))
        names = " and ".join(result.name for result in results)
        introduction: list[Block] = [*(Text(note, note=True) for note in notes), _facts(results), *map(Text, READING)]
        self._write("index.html", page(f"Gates of {names} on the {self.split} split", introduction, sections))

    def _write(self, name: str, content: str) -> None:
        with atomic_write(self.folder / name) as file:
            file.write(content.encode("utf-8", "replace"))  # lone surrogates
        self.written.append(self.folder / name)
        self.advance(name)

    def _figure(self, figure: Figure | None, name: str, caption: str, *, vector: bool = True) -> Iterator[Picture]:
        if figure is not None:
            files = figures.save(figure, self.folder / name.replace(":", "_"), vector=vector)
            self.written += files
            self.advance(files[0].name)
            yield Picture(files[0], caption)

    def _variation(self, results: Sequence[Result]) -> Iterator[Picture | Table]:
        for number, result in enumerate(results):
            text = f"{result.name}: parts of the variance of G"
            yield from self._figure(figures.variation(result), _named("variation", number), text)
            rows: list[list[Cell]] = [
                [*place, *(100 * shares[part] for part in figures.SHARES)]
                for place, shares in result.shares.items()
                if shares is not None
            ]
            head = ["task", "site", "layer", *(figures.PARTS[part][0] + ", %" for part in figures.SHARES)]
            yield Table(f"{result.name}: parts of the variance of G", head, rows, folded=True)

    def _comparison(self, first: Result, second: Result) -> Section:
        blocks: list[Block] = []
        for task in (task for task in first.tasks if task in second.tasks):
            text = f"{task}: mean of G of both checkpoints, and the second minus the first, by layer and kind of token"
            blocks += self._figure(figures.compared(first, second, task), f"compared_{task}", text)
        found = sorted(differences(first, second), key=lambda row: -abs(row[-1] - row[-2]))
        rows: list[list[Cell]] = [[*row, row[-1] - row[-2]] for row in found]
        if not rows:
            return Section(
                "Comparison", [Text("The checkpoints have no task and site with a gate in common.", note=True)]
            )
        head = ["task", "site", "layer", "kind", first.name, second.name, "second - first"]
        return Section("Comparison", [*blocks, Table("All differences, largest first", head, rows, folded=True)])

    def _task(
        self, results: Sequence[Result], task: str, pictures: Mapping[str, Sequence[Path]]
    ) -> Iterator[Picture | Text]:
        for number, result in enumerate(results):
            if task not in result.tasks:
                yield Text(f"{result.name} has no samples of this task.", note=True)
                continue
            about = f"{result.name}, {task}"
            text = f"{about}: mean of G by layer and kind of token"
            yield from self._figure(figures.kinds(result, task), _named(f"kinds_{task}", number), text)
            text = f"{about}: distribution of G in every layer"
            yield from self._figure(figures.distributions(result, task), _named(f"distribution_{task}", number), text)
            for site in result.sites:
                if not any(place[:2] == (task, site) for place in result.positions):
                    yield Text(f"{result.name}, {site}: {result.granularity(site)}, so there is no map of the image.")
                    continue
                name, text = _named(f"positions_{task}_{site}", number), f"{about}, {site}: mean of G on the image grid"
                yield from self._figure(figures.positions(result, task, site), name, text)
                name, text = _named(f"overlay_{task}_{site}", number), f"{about}, {site}: G over images of the split"
                yield from self._figure(figures.overlays(result, task, site, pictures), name, text, vector=False)


def _named(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_second"


def _facts(results: Sequence[Result]) -> Table:
    names = dict.fromkeys(name for result in results for name in result.about)
    rows: list[list[Cell]] = [[name, *(r.about.get(name, "") for r in results)] for name in names]
    rows.append(["samples", *(", ".join(f"{t} {n:,}" for t, n in r.samples.items()) for r in results)])
    rows.append(["gates", *("; ".join(f"{s}: {r.gates[s]}, {r.granularity(s)}" for s in r.sites) for r in results)])
    return Table("Checkpoints", ["", *(result.name for result in results)], rows)


def _numbers(result: Result) -> Table:
    rows = [list(row.values()) for row in result.rows()]
    head = [name.replace("_", " ") for name in next(result.rows())]
    return Table(f"{result.name}: {len(rows)} distributions", head, rows, folded=True)


def as_csv(results: Sequence[Result]) -> str:
    """Return all statistics as CSV, with the checkpoint's name in the first column."""
    rows: list[dict[str, Any]] = [{"run": result.name, **row} for result in results for row in result.rows()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
