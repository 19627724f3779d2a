"""The report as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlpet_lightning.pages import Block, Picture, Section, Table, Text
from vlpet_lightning.pages import page as whole_page
from vlpet_lightning.reports.comparison import Comparison
from vlpet_lightning.reports.formats import caption, cells, has_backbones, head, interval_rows, marked

CAPTIONS = {
    "pareto": "Average score against trained parameters, without rows that are not comparable. Bars: standard "
    "deviation over seeds.",
    "gain": "Relative gain of the average over full fine-tuning (the paper's figure 1).",
    "curves": "Training loss and validation score. Lines are means over seeds, bands reach from the lowest to the "
    "highest.",
    "profile": "Scores by task, coloured by the gain over the row that all are compared with.",
    "contact_sheet": "Predictions on test images.",
}


@dataclass(frozen=True)
class ComparisonTable:
    """The table of a comparison with bold scores, marks and footnotes.

    Args:
        comparison: The comparison.
    """

    comparison: Comparison

    def html(self) -> str:
        """Return table and footnotes."""
        lines, notes = self.comparison.lines()
        left = 2 if has_backbones(self.comparison) else 1
        about = escape(caption(self.comparison))
        names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head(self.comparison))
        rows = []
        for line in lines:
            texts = [escape(text) for text in cells(self.comparison, line)]
            for column in line.bold:
                texts[left + 1 + column] = f"<b>{texts[left + 1 + column]}</b>"
            texts[0] += f" <sup>{','.join(line.notes)}</sup>" if line.notes else ""
            kinds = ["" if number < left else ' class="number"' for number in range(len(texts))]
            row = "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, texts, strict=True))
            rows.append(f'<tr class="{line.kind}">{row}</tr>')
        said = [f"<sup>{mark}</sup> {escape(note)}" for mark, note in marked(notes)]
        return (
            f'<p>{about}</p><div class="scroll whole" tabindex="0" role="region" aria-label="{about}">'
            f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
            + "".join(f"<p>{text}</p>" for text in said)
        )


def page(
    comparison: Comparison,
    figures: Sequence[Path],
    *,
    title: str,
    about: str,
    protocol: Sequence[tuple[str, str]],
    metrics: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
) -> str:
    """Return the page.

    Args:
        comparison: The comparison.
        figures: Image files, which are embedded; of several formats of one figure, the SVG.
        title: Heading.
        about: Explanation of the intervals.
        protocol: Facts of the protocol of most rows, as name and value.
        metrics: Headings and rows of further tables, by title.
    """
    introduction: list[Block] = [ComparisonTable(comparison), *(Text(text, note=True) for text in comparison.warnings)]
    sections = []
    names, rows = interval_rows(comparison)
    if rows:
        sections.append(Section("Differences", [Text(about), Table("Differences", names, rows, whole=True)]))
    pictures = [Picture(path, CAPTIONS.get(path.stem, path.stem)) for path in chosen_formats(figures)]
    sections += [Section("Figures", pictures)] if pictures else []
    sections += [Section(name, [Table(name, headings, table)]) for name, (headings, table) in metrics.items()]
    if protocol:
        facts = [list(fact) for fact in protocol]
        sections.append(Section("Protocol", [Table("Protocol of most rows", ["item", "value"], facts)]))
    return whole_page(title, introduction, sections)


def chosen_formats(figures: Sequence[Path]) -> list[Path]:
    """Return one file of each figure: the SVG if there is one."""
    found: dict[str, Path] = {}
    for path in figures:
        if path.stem not in found or path.suffix == ".svg":
            found[path.stem] = path
    return list(found.values())
