"""Markdown, LaTeX, CSV and HTML of the same table."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.reports.run_folders import all_scores, make_record, write_run
from vlpet_lightning.reports import formats
from vlpet_lightning.reports.comparison import Comparison
from vlpet_lightning.reports.figures import write_figures
from vlpet_lightning.reports.groups import group_runs
from vlpet_lightning.reports.page import page
from vlpet_lightning.reports.runs import find_runs

NAMES = ["Full FT", "Full FT", "a_b & <c> 50% | x"]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    full = [make_record(seed=seed, percent=100.0, method={"published": "full/bart"}) for seed in (1, 2)]
    for number, record in enumerate([*full, make_record()]):
        settings = [] if number < 2 else [{"rank": 1}]
        write_run(tmp_path / f"{number}", all_scores(60.0 + number), record, placements=settings, losses=20)
    runs, _ = find_runs([tmp_path])
    return Comparison(group_runs(runs, NAMES))


def test_markdown_has_a_row_per_line_with_its_marks(comparison: Comparison) -> None:
    lines = formats.as_markdown(comparison).splitlines()
    assert lines[0].startswith(
        "Test scores on facebook/bart-base, mean (sample standard deviation) over seeds. Scores: "
    )
    assert lines[2] == "| method | trained % | VQAv2 | GQA | NLVR2 | COCO caption | average | seeds |"
    assert lines[3] == "| --- |" + " ---: |" * 7
    assert lines[4].startswith("| Full FT | 100.00 | 60.50 (0.71) | **50.00 (0.00)** |")
    assert lines[5].startswith("| published <sup>a,b</sup> | 100.00 | 66.88 (0.17) |")
    assert lines[6].startswith("| a_b & <c> 50% \\| x | 4.16 | **62.00** |")
    assert {line.count("|") - line.count("\\|") for line in lines[2:7]} == {9}


def test_csv_has_unrounded_numbers_and_the_notes(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(formats.as_csv(comparison))))
    assert [row["kind"] for row in rows] == ["measured", "published", "measured"]
    assert float(rows[0]["vqa_mean"]) == 60.5
    assert float(rows[0]["vqa_std"]) == pytest.approx(0.5**0.5)
    assert rows[2]["vqa_std"] == ""
    assert "table 2; not measured here; not comparable" in rows[1]["notes"]
    each = list(csv.DictReader(io.StringIO(formats.runs_csv(comparison.groups))))
    assert len(each) == 3 * 6
    assert {row["seed"] for row in each} == {"1", "2"}


def test_latex_is_escaped_and_has_as_many_cells_as_columns(comparison: Comparison) -> None:
    text = formats.as_latex(comparison)
    (columns,) = re.findall(r"\\begin{tabular}{([lr]+)}", text)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
    assert r"a\_b \& \textless{}c\textgreater{} 50\% | x" in text
    assert all(f"\\{name}rule" in text for name in ("top", "mid", "bottom"))
    assert text.count("{") == text.count("}")
    assert r"& 4.16 & \textbf{62.00} &" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(comparison: Comparison, tmp_path: Path) -> None:
    lines = [
        r"\documentclass{article}\usepackage{booktabs,threeparttable}\begin{document}",
        formats.as_latex(comparison),
    ]
    (tmp_path / "t.tex").write_text("\n".join([*lines, r"\end{document}"]))
    ended = subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:]
    assert (tmp_path / "t.pdf").is_file()


class Checker(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_well_formed_escaped_and_has_the_figures(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    figures = write_figures(comparison, tmp_path / "out")
    text = page(comparison, figures, title="<i>title</i>", about="", protocol=[("a", "<b>")], metrics={})
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.seen.count("img") == 4
    assert "script" not in checker.seen
    assert "i" not in checker.seen
    assert checker.seen.count("b") > 2
    assert checker.seen.count("sup") > 2
    assert "a_b & <c> 50% | x" in checker.texts
    assert "<b>" in checker.texts
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_several_backbones_have_a_column(tmp_path: Path) -> None:
    for name in ("bart", "t5"):
        backbone = {"kind": name, "name": f"{name}-base", "sizes": {}, "checksums": {}}
        write_run(tmp_path / name, all_scores(60), make_record(backbone=backbone))
    found = Comparison(group_runs(find_runs([tmp_path])[0]))
    assert formats.head(found)[:3] == ["method", "backbone", "trained %"]
    assert "| bart | bart-base | 4.16 |" in formats.as_markdown(found)
    assert "on " not in formats.caption(found).partition(".")[0]
