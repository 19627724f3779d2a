"""The report as one HTML page that loads nothing else and has no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from vlpet_lightning.reports.comparison import Comparison
from vlpet_lightning.reports.formats import caption, cells, has_backbones, head, interval_rows, marked

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.3rem 0; }
thead th { border-top: 2px solid; border-bottom: 1px solid; }
tbody tr:last-child td { border-bottom: 2px solid; }
th, td { padding: 0.2rem 0.6rem; text-align: right; vertical-align: top; }
th.l, td.l { text-align: left; }
tr.published { opacity: 0.7; }
tr.difference { font-style: italic; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: white; }
.warning { border-left: 4px solid #d55e00; padding-left: 0.7rem; }
.notes { font-size: 0.85em; }
"""
CAPTIONS = {
    "pareto": "Average score against trained parameters, without rows that are not comparable. Bars: standard "
    "deviation over seeds.",
    "gain": "Relative gain of the average over full fine-tuning (the paper's figure 1).",
    "curves": "Training loss and validation score. Lines are means over seeds, bands reach from the lowest to the "
    "highest.",
    "profile": "Scores by task, coloured by the gain over the row that all are compared with.",
    "contact_sheet": "Predictions on test images.",
}
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def html_table(names: Sequence[str], rows: Sequence[Sequence[str]], left: int, title: str = "") -> list[str]:
    """Return the lines of a table with escaped texts.

    Args:
        names: Headings.
        rows: Texts of the cells.
        left: Number of columns that are aligned to the left.
        title: Caption.
    """
    side = [' class="l"' if number < left else "" for number in range(len(names))]
    found = ['<div class="scroll"><table>', *([f"<caption>{escape(title)}</caption>"] if title else [])]
    found.append("<thead><tr>" + "".join(f"<th{s}>{escape(name)}</th>" for s, name in zip(side, names, strict=True)))
    found.append("</tr></thead><tbody>")
    for row in rows:
        found.append(
            "<tr>" + "".join(f"<td{s}>{escape(text)}</td>" for s, text in zip(side, row, strict=True)) + "</tr>"
        )
    return [*found, "</tbody></table></div>"]


def _main_table(comparison: Comparison) -> list[str]:
    lines, notes = comparison.lines()
    left = 2 if has_backbones(comparison) else 1
    names = head(comparison)
    found = [f'<div class="scroll"><table><caption>{escape(caption(comparison))}</caption><thead><tr>']
    found += [f"<th{' class=l' * (number < left)}>{escape(name)}</th>" for number, name in enumerate(names)]
    found.append("</tr></thead><tbody>")
    for line in lines:
        texts = [escape(text) for text in cells(comparison, line)]
        for column in line.bold:
            texts[left + 1 + column] = f"<b>{texts[left + 1 + column]}</b>"
        texts[0] += f" <sup>{','.join(line.notes)}</sup>" if line.notes else ""
        row = "".join(f"<td{' class=l' * (number < left)}>{text}</td>" for number, text in enumerate(texts))
        found.append(f'<tr class="{line.kind}">{row}</tr>')
    found.append("</tbody></table></div>")
    notes_ = [f"<sup>{mark}</sup> {escape(note)}" for mark, note in marked(notes)]
    return [*found, f'<p class="notes">{"<br>".join(notes_)}</p>' if notes_ else ""]


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
    parts = [f"<h1>{escape(title)}</h1>", *_main_table(comparison)]
    parts += [f'<p class="warning">{escape(text)}</p>' for text in comparison.warnings]
    names, rows = interval_rows(comparison)
    if rows:
        parts += ["<h2>Differences</h2>", f"<p>{escape(about)}</p>", *html_table(names, rows, 1)]
    for path in chosen_formats(figures):
        data = base64.b64encode(path.read_bytes()).decode()
        text = escape(CAPTIONS.get(path.stem, path.stem))
        source = f"data:{TYPES[path.suffix]};base64,{data}"
        parts.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    for name, (headings, table) in metrics.items():
        parts += [f"<h2>{escape(name)}</h2>", *html_table(headings, table, 4)]
    if protocol:
        parts += ["<h2>Protocol of most rows</h2>", *html_table(["item", "value"], [list(row) for row in protocol], 2)]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head_ = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
    ]
    return "\n".join([*head_, *parts, "</body></html>", ""])


def chosen_formats(figures: Sequence[Path]) -> list[Path]:
    """Return one file of each figure: the SVG if there is one."""
    found: dict[str, Path] = {}
    for path in figures:
        if path.stem not in found or path.suffix == ".svg":
            found[path.stem] = path
    return list(found.values())
