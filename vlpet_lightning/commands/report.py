"""The ``report`` command: finished runs compared over seeds, as tables, figures and a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vlpet_lightning.atomic_file import atomic_write, check_folder
from vlpet_lightning.commands import protocols
from vlpet_lightning.prediction_files import read_predictions
from vlpet_lightning.protocol import summary
from vlpet_lightning.reports import formats
from vlpet_lightning.reports.bootstrap import RESAMPLES, SEED
from vlpet_lightning.reports.comparison import AVERAGE, Comparison
from vlpet_lightning.reports.groups import Group, group_runs
from vlpet_lightning.reports.metrics import metric_rows
from vlpet_lightning.reports.runs import ReportError, Run, find_runs
from vlpet_lightning.tasks import TASKS

FEW = 4  # rows up to which all metrics and protocols are shown side by side


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning report",
        description="Compare finished runs. Runs that differ only in their seed are one row with mean and standard "
        "deviation; published rows stand beside those of the same method. Written are report.md, table.tex (booktabs), "
        "table.csv, runs.csv, scores.json, index.html, and figures as PNG and SVG.",
        allow_abbrev=False,
    )
    found.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folder of a tested run or of a sweep, or a folder of these"
    )
    found.add_argument("--runs", dest="listed", metavar='"[RUN,...]"', help="the same as one list")
    found.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    found.add_argument(
        "--names",
        metavar='"[NAME,...]"',
        help="name of each run; runs with the same name form one row (default: found)",
    )
    found.add_argument(
        "--baseline", metavar="NAME", help="row to compare with (default: full fine-tuning, else the best)"
    )
    found.add_argument(
        "--images", type=Path, metavar="DIR", help="test images, <store>/<id>.png or .jpg, for a contact sheet"
    )
    found.add_argument(
        "--resamples",
        type=int,
        default=RESAMPLES,
        metavar="N",
        help=f"of the bootstrap; 0 for none (default: {RESAMPLES})",
    )
    found.add_argument("--title", default="Report", help="heading of report.md and index.html")
    return found


def report_command(args: Sequence[str]) -> None:
    """Parse the command line and write the report.

    Args:
        args: The runs and options; ``--help`` shows them.
    """
    known = parser().parse_args(args)
    runs = [*known.runs, *map(Path, _listed(known.listed))]
    names = None if known.names is None else _listed(known.names)
    report(runs, known.out, names, known.images, baseline=known.baseline, resamples=known.resamples, title=known.title)


def _listed(text: str | None) -> list[str]:
    """Return the parts of a list such as ``[a,b]``."""
    return [
        part.strip() for part in (text or "").strip().removeprefix("[").removesuffix("]").split(",") if part.strip()
    ]


def report(
    runs: Sequence[Path] | Path,
    out: Path,
    names: Sequence[str] | None = None,
    images: Path | None = None,
    *,
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    title: str = "Report",
) -> Comparison:
    """Write a report of finished runs, and print its tables.

    Args:
        runs: Folders of tested runs or of sweeps, or folders of these.
        out: Folder for the report's files.
        names: Name of each run; runs of the same name form one row. By default, runs that differ only in their seed do.
        images: Folder with the test images, as <store>/<image id>.png or .jpg; without it there is no contact sheet.
        baseline: Name of the row that the others are compared with; by default full fine-tuning, else the best.
        resamples: Number of resamples of the bootstrap; 0 for none.
        title: Heading of the report.

    Returns:
        The comparison.

    Raises:
        FileExistsError: If ``out`` is a file.
        FileNotFoundError: If a folder is missing, or a run was not tested.
        ValueError: If names and runs do not fit, or an option is out of range.
    """
    paths = [runs] if isinstance(runs, Path) else list(runs)
    if not paths:
        raise ReportError("no run to report: give the folders of tested runs, or of a sweep")
    if resamples < 0:
        raise ReportError(f"--resamples must be 0 or more, got {resamples}")
    found, untested = find_runs(paths)
    if not found:
        raise FileNotFoundError(
            f"none of the {len(untested)} runs has test scores: run `python -m vlpet_lightning test` with their "
            "checkpoints, or the sweep with --test"
        )
    comparison = Comparison(group_runs(found, names), untested, baseline)
    check_folder(out)
    console = Console()
    if resamples:
        _bootstrap(comparison, resamples, console)
    out.mkdir(parents=True, exist_ok=True)
    written = _write(comparison, out, images, title, resamples)
    _print(comparison, console, resamples)
    console.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)
    return comparison


def _bootstrap(comparison: Comparison, resamples: int, console: Console) -> None:
    if len(comparison.groups) < 2:
        return
    runs = [run for group in comparison.groups for run in group.runs]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("reading predictions", total=len(runs) * len(comparison.tasks))
        comparison.bootstrap(resamples, SEED, lambda: progress.advance(bar))


def about_intervals(comparison: Comparison, resamples: int) -> str:
    """Return what the intervals are."""
    left_out = [f"{task} has none: {reason}." for task, reason in comparison.left_out.items()]
    text = (
        f"Differences to {comparison.reference.label} with 95 % percentile intervals of a paired bootstrap over the "
        f"test questions, and over the seeds where both sides have several ({resamples:,} resamples). A star marks an "
        "interval without 0. Each interval is of one comparison and not corrected for their number; a few seeds "
        "resample coarsely."
    )
    return " ".join([text, *left_out])


# files ---------------------------------------------------------------------------------------------------------------


def _write(comparison: Comparison, out: Path, images: Path | None, title: str, resamples: int) -> list[Path]:
    from vlpet_lightning.reports.figures import write_figures  # matplotlib takes half a second

    figures = write_figures(comparison, out)
    if images is not None:
        from vlpet_lightning.reports.contact_sheet import contact_sheet

        first = comparison.groups[0]
        contact_sheet(_predictions(first.runs[0]), images, out / "contact_sheet.png", title=first.label)
        figures.append(out / "contact_sheet.png")
    records = _records(comparison.groups)
    texts = {
        "report.md": as_markdown(comparison, records, figures, title, resamples),
        "table.tex": formats.as_latex(comparison),
        "table.csv": formats.as_csv(comparison),
        "runs.csv": formats.runs_csv(comparison.groups),
        "scores.json": json.dumps(as_json(comparison, records), indent=1) + "\n",
        "index.html": _page(comparison, figures, title, resamples),
    }
    for name, text in texts.items():
        with atomic_write(out / name) as file:
            file.write(text.encode())
    return [*(out / name for name in texts), *figures]


def as_markdown(
    comparison: Comparison, records: protocols.Records, figures: Sequence[Path], title: str, resamples: int
) -> str:
    """Return the report in Markdown."""
    lines = [f"# {title}", "", formats.as_markdown(comparison)]
    lines += [f"> Warning: {text}\n" for text in comparison.warnings]
    names, rows = formats.interval_rows(comparison)
    if rows:
        lines += ["## Differences", "", about_intervals(comparison, resamples), ""]
        lines += [*formats.markdown_table(names, rows), ""]
    lines += [f"![{path.stem}]({path.name})" for path in figures if path.suffix == ".png"]
    if len(comparison.groups) <= FEW:
        names, rows = metric_rows(comparison.groups)
        return "\n".join([*lines, "", "## All metrics", "", *formats.markdown_table(names, rows, 4), ""]) + (
            protocols.as_markdown(records)
        )
    facts = [list(fact) for fact in _facts(comparison)]
    lines += ["", "## Protocol of most rows", "", *formats.markdown_table(["item", "value"], facts, 2)]
    return "\n".join(lines) + "\n"


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the main facts of the protocol of most rows; those of single runs are left out."""
    group = (comparison.comparable or comparison.groups)[0]
    return [fact for fact in summary(group.record) if fact[0] not in ("record", "seed")] if group.record else []


def _page(comparison: Comparison, figures: Sequence[Path], title: str, resamples: int) -> str:
    from vlpet_lightning.reports.page import page

    metrics = {"All metrics": metric_rows(comparison.groups)} if len(comparison.groups) <= FEW else {}
    return page(
        comparison,
        figures,
        title=title,
        about=about_intervals(comparison, resamples),
        protocol=_facts(comparison),
        metrics=metrics,
    )


def as_json(comparison: Comparison, records: protocols.Records) -> dict[str, Any]:
    """Return all numbers of the report as plain data."""
    return {
        "rows": {group.label: _row(group) for group in comparison.groups},
        "not_comparable": comparison.against,
        "warnings": comparison.warnings,
        "baseline": comparison.reference.label,
        "differences_to_baseline": {
            label: {name: asdict(interval) for name, interval in found.items()}
            for label, found in comparison.intervals.items()
        },
        "without_intervals": comparison.left_out,
        "scores": {
            group.label if len(group.runs) == 1 else f"{group.label} (seed {run.seed})": run.scores
            for group in comparison.groups
            for run in group.runs
        },
        **protocols.as_json(records),
    }


def _row(group: Group) -> dict[str, Any]:
    values = {task: group.score(task) for task in group.tasks} | {AVERAGE: group.average()}
    return {
        "backbone": group.backbone,
        "trainable": group.trainable,
        "percent": group.percent,
        "seeds": [run.seed for run in group.runs],
        "runs": [str(run.folder) for run in group.runs],
        "scores": {name: None if value is None else asdict(value) for name, value in values.items()},
    }


def _records(groups: Sequence[Group]) -> dict[str, protocols.Record | None]:
    """Return the protocol record of each group's first run; each of them if its tasks were tested under several."""
    found: dict[str, protocols.Record | None] = {}
    for group in groups:
        records = group.runs[0].records
        if len(records) > 1:
            found |= {f"{group.label} ({digest})": record for digest, record in records.items()}
        else:
            found[group.label] = group.record or None
    return found


def _predictions(run: Run) -> dict[str, list[dict[str, Any]]]:
    files = {task: run.prediction_file(task) for task in TASKS}
    return {task: read_predictions(path).records for task, path in files.items() if path.is_file()}


# terminal ------------------------------------------------------------------------------------------------------------


def _print(comparison: Comparison, console: Console, resamples: int) -> None:
    console.print(formats.as_table(comparison))
    for mark, note in formats.marked(comparison.lines()[1]):
        console.print(Text(f"{mark}: {note}", style="dim"), soft_wrap=True)
    for text in comparison.warnings:
        console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)
    names, rows = formats.interval_rows(comparison)
    if rows:
        console.print(_table("differences", names, rows, 1))
        console.print(Text(about_intervals(comparison, resamples), style="dim"), soft_wrap=True)
    if len(comparison.groups) > FEW:
        return
    names, rows = metric_rows(comparison.groups)
    console.print(_table("all metrics", names, rows, 4))
    for part in protocols.as_tables(_records(comparison.groups)):
        console.print(part)


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    table = Table(title=title)
    for number, name in enumerate(names):
        table.add_column(Text(name), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
