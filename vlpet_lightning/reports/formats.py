"""The table of a comparison as Markdown, LaTeX, CSV, and for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from vlpet_lightning.reports.bootstrap import Interval
from vlpet_lightning.reports.comparison import AVERAGE, Comparison, Kind, Line, mark_of, title
from vlpet_lightning.reports.groups import Group, Value

SPREAD = "mean (sample standard deviation) over seeds"
SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
METHOD_WIDTH = 16  # of the terminal's first column, at least
STYLES: Mapping[Kind, str] = {"measured": "", "published": "dim", "difference": "italic"}


def shown(line: Line, value: Value | None) -> str:
    """Return the text of a score; a difference has its sign."""
    if value is None:
        return ""
    return f"{value.mean:+.2f}" if line.kind == "difference" else str(value)


def cells(comparison: Comparison, line: Line) -> list[str]:
    """Return the texts of a line: method, backbone (if the groups have several), percent, scores, seeds."""
    backbone = [line.backbone] if has_backbones(comparison) else []
    percent = "" if line.percent is None else f"{line.percent:.2f}"
    scores = [shown(line, value) for value in line.values]
    return [line.label, *backbone, percent, *scores, "" if line.seeds is None else str(line.seeds)]


def head(comparison: Comparison) -> list[str]:
    """Return the headings of the columns."""
    backbone = ["backbone"] if has_backbones(comparison) else []
    return ["method", *backbone, "trained %", *comparison.headings, "seeds"]


def has_backbones(comparison: Comparison) -> bool:
    """Whether the groups have several backbones, which need a column."""
    return len({group.backbone for group in comparison.groups}) > 1


def caption(comparison: Comparison) -> str:
    """Return what the numbers are, in a sentence."""
    names = {group.backbone for group in comparison.groups}
    backbone = f" on {names.pop()}" if len(names) == 1 and "" not in names else ""
    several = any(len(group.runs) > 1 for group in comparison.groups)
    return f"Test scores{backbone}{f', {SPREAD}' if several else ''}. {comparison.units}"


# terminal ------------------------------------------------------------------------------------------------------------


def as_table(comparison: Comparison) -> Table:
    """Return the table for the terminal."""
    lines, _ = comparison.lines()
    table = Table(title=caption(comparison))
    first = len(head(comparison)) - len(comparison.headings) - 1
    for number, name in enumerate(head(comparison)):
        least = METHOD_WIDTH if number == 0 else None
        table.add_column(name, justify="left" if number < first - 1 else "right", overflow="fold", min_width=least)
    for line in lines:
        texts = [Text(text) for text in cells(comparison, line)]
        texts[0].append(f" {','.join(line.notes)}" if line.notes else "", style="dim")
        for column in line.bold:
            texts[first + column].stylize("bold")
        table.add_row(*texts, style=STYLES[line.kind])
    return table


# Markdown ------------------------------------------------------------------------------------------------------------


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table.

    Args:
        names: Headings.
        rows: Texts of the cells.
        left: Number of columns that are aligned to the left.
    """
    escaped = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (names, *rows)]
    rule = ["---"] * left + ["---:"] * (len(names) - left)
    return ["| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:])]


def as_markdown(comparison: Comparison) -> str:
    """Return caption, table and footnotes in Markdown."""
    lines, notes = comparison.lines()
    left = 2 if has_backbones(comparison) else 1
    rows = []
    for line in lines:
        texts = cells(comparison, line)
        for column in line.bold:
            texts[left + 1 + column] = f"**{texts[left + 1 + column]}**"
        texts[0] += f" <sup>{','.join(line.notes)}</sup>" if line.notes else ""
        rows.append(texts)
    found = [caption(comparison), "", *markdown_table(head(comparison), rows, left), ""]
    found += [f"<sup>{mark}</sup> {note}  " for mark, note in marked(notes)]
    return "\n".join(found) + "\n"


def marked(notes: Sequence[str]) -> list[tuple[str, str]]:
    """Return the footnotes with their marks."""
    return [(mark_of(number), note) for number, note in enumerate(notes)]


# LaTeX ---------------------------------------------------------------------------------------------------------------


def escape_latex(text: str) -> str:
    """Escape LaTeX's special characters.

    >>> escape_latex("50 % of a_b & c")
    '50 \\\\% of a\\\\_b \\\\& c'
    """
    return "".join(SPECIAL.get(character, character) for character in text)


def as_latex(comparison: Comparison) -> str:
    """Return a LaTeX table for the packages booktabs and threeparttable, in the layout of the paper's table 2."""
    lines, notes = comparison.lines()
    left = 2 if has_backbones(comparison) else 1
    names = head(comparison)
    columns = "l" * left + "r" * (len(names) - left)
    titles = ["Method", *(["Backbone"] if left == 2 else []), "Trained (\\%)"]
    titles += [*(escape_latex(title(task)) for task in comparison.tasks), "Avg.", "Seeds"]
    rows = []
    for number, line in enumerate(lines):
        texts = [escape_latex(text).replace("+", "$+$").replace(" - ", " $-$ ") for text in cells(comparison, line)]
        texts = [f"$-${text[1:]}" if text.startswith("-") else text for text in texts]
        for column in line.bold:
            texts[left + 1 + column] = rf"\textbf{{{texts[left + 1 + column]}}}"
        texts[0] += rf"\tnote{{{','.join(line.notes)}}}" if line.notes else ""
        rule = [r"\midrule"] if number and line.kind == "measured" and lines[number - 1].kind != "measured" else []
        rows += [*rule, " & ".join(texts) + r" \\"]
    return "\n".join(
        [
            r"% \usepackage{booktabs, threeparttable}",
            r"\begin{table}",
            r"\centering",
            r"\begin{threeparttable}",
            rf"\caption{{{escape_latex(caption(comparison))}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(titles) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *(
                [
                    r"\begin{tablenotes}",
                    *(rf"\item[{mark}] {escape_latex(note)}" for mark, note in marked(notes)),
                    r"\end{tablenotes}",
                ]
                if notes
                else []
            ),
            r"\end{threeparttable}",
            r"\end{table}",
            "",
        ]
    )


# CSV -----------------------------------------------------------------------------------------------------------------


def as_csv(comparison: Comparison) -> str:
    """Return one row per line of the table, with unrounded numbers."""
    lines, notes = comparison.lines()
    reasons = dict(marked(notes))
    columns = [*comparison.tasks, AVERAGE]
    names = ["kind", "method", "backbone", "trained_percent", "seeds"]
    names += [f"{column}_{part}" for column in columns for part in ("mean", "std")]
    rows: list[list[object]] = []
    for line in lines:
        numbers = [(None, None) if value is None else (value.mean, value.std) for value in line.values]
        flat = [number for pair in numbers for number in pair]
        said = "; ".join(reasons[mark] for mark in line.notes)
        rows.append([line.kind, line.label, line.backbone, line.percent, line.seeds, *flat, said])
    return _csv([*names, "notes"], rows)


def runs_csv(groups: Sequence[Group]) -> str:
    """Return one row per score of each run: all metrics, unrounded."""
    rows = [
        [group.label, run.seed, str(run.folder), task, metric, value]
        for group in groups
        for run in group.runs
        for task, scores in run.scores.items()
        for metric, value in scores.items()
    ]
    return _csv(["method", "seed", "run", "task", "metric", "score"], rows)


def _csv(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()


# intervals -----------------------------------------------------------------------------------------------------------


def interval_text(interval: Interval) -> str:
    """Return a difference with its widest interval; a star marks one that excludes 0."""
    low, high = interval.widest
    return f"{interval.difference:+.2f} [{low:+.2f}, {high:+.2f}]" + ("*" if interval.excludes_zero else "")


def interval_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the differences to the baseline."""
    columns = [
        name for name in (*comparison.tasks, AVERAGE) if any(name in some for some in comparison.intervals.values())
    ]
    rows = [[label, *(interval_text(found[name]) for name in columns)] for label, found in comparison.intervals.items()]
    return [f"minus {comparison.reference.label}", *(title(name) for name in columns)], rows
