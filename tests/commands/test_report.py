"""Tables and figures of finished runs."""

from __future__ import annotations

import csv
import json
import warnings

import pytest
from matplotlib.axes import Axes
from PIL import Image

from vlpet_lightning.__main__ import run
from vlpet_lightning.commands.figures import curves
from vlpet_lightning.commands.protocols import splits_of
from vlpet_lightning.commands.report import as_markdown, read_scores, report
from vlpet_lightning.loggers import CSVLog, read_metrics

TEST = {
    "test/vqa/accuracy_original": 60.0,
    "test/vqa/accuracy": 61.0,
    "test/gqa/accuracy": 50.0,
    "test/nlvr2/consistency": 10.0,
    "test/nlvr2/accuracy": 70.0,
    "test/caption/bleu4": 30.0,
    "test/caption/cider": 100.0,
}


def write_run(folder, scores, pictures=None, *, fitted=True):
    rows = [{"step": step, "train/vqa/loss": 1.0 / step} for step in range(1, 30)]
    rows += [{"step": 15, "val/vqa/accuracy_original": 40.0}, {"step": 29, "val/vqa/accuracy_original": 50.0}]
    rows = rows if fitted else []
    rows += [{"step": 29, **scores}] if scores else []
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    if pictures is not None:
        (folder / "predictions").mkdir()
        for task, names, reference in pictures:
            entries = [
                {"question_id": str(n), "prediction": "red", "images": names, "text": "What?", "reference": reference}
                for n in range(6)
            ]
            (folder / "predictions" / f"test_{task}.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def images(tmp_path):
    for name in ("COCO/a", "nlvr/l", "nlvr/r"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(path)
    return tmp_path / "images"


def test_the_table_has_each_score_and_the_average_of_those_that_stand_for_a_task(tmp_path):
    scores = {"a": read_scores(write_run(tmp_path / "a", TEST)), "b": {"vqa": {"accuracy": 5.0}}}
    assert as_markdown(scores).splitlines() == [
        "| task | split | metric | scale | a | b |",
        "|---|---|---|---|---:|---:|",
        "| vqa | test | accuracy_original | percent | 60.00 |  |",
        "| vqa | test | accuracy | percent | 61.00 | 5.00 |",
        "| gqa | test | accuracy | percent | 50.00 |  |",
        "| nlvr2 | test | accuracy | percent | 70.00 |  |",
        "| nlvr2 | test | consistency | percent | 10.00 |  |",
        "| caption | test | cider | x 100 | 100.00 |  |",
        "| caption | test | bleu4 | x 100 | 30.00 |  |",
        "| average |  |  |  | 70.00 |  |",
    ]


def test_a_run_without_the_score_of_one_of_its_tasks_has_no_average(tmp_path):
    undefined = {name: value for name, value in TEST.items() if name != "test/caption/cider"}
    assert (
        as_markdown({"a": read_scores(write_run(tmp_path / "a", undefined))}).splitlines()[-1]
        == "| average |  |  |  |  |"
    )


def test_the_last_test_of_a_run_counts(tmp_path):
    run = write_run(tmp_path / "a", TEST)
    lines = (run / "metrics.csv").read_text().splitlines()
    again = lines[-1].replace("60.0", "65.0")
    (run / "metrics.csv").write_text("\n".join([*lines, again]) + "\n")
    assert read_scores(run)["vqa"]["accuracy_original"] == 65.0


def test_everything_is_written(tmp_path, images, capsys):
    pictures = [
        ("vqa", ["a"], {"answers": ["red"] * 10, "label": {"red": 1.0}}),
        ("nlvr2", ["l", "r"], {"label": "true", "identifier": "x"}),
        ("caption", ["a"], {"captions": ["a red thing"]}),
    ]
    runs = [write_run(tmp_path / "a", TEST, pictures), write_run(tmp_path / "b", TEST)]
    report(runs=runs, out=tmp_path / "out", names=["ours", "theirs"], images=images)
    assert "ours" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]["ours"]["gqa"] == {"accuracy": 50.0}
    assert "| average |  |  |  | 70.00 | 70.00 |" in (tmp_path / "out" / "report.md").read_text()
    sheet, curves = (Image.open(tmp_path / "out" / name) for name in ("contact_sheet.png", "curves.png"))
    assert sheet.height > 2.5 * curves.height / 2  # three tasks, one row each
    assert len(sheet.convert("RGB").getcolors(1 << 20)) > 10


def test_a_run_that_was_not_tested_is_named_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no test scores in .*run `python -m vlpet_lightning test"):
        report(runs=[write_run(tmp_path / "a", {})], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_tested_alone_has_no_curves(tmp_path, capsys):
    folder = write_run(tmp_path / "a", TEST, fitted=False)
    assert run(["report", "--runs", str(folder), "--out", str(tmp_path / "out")]) == 0  # a single path is a list of one
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "scores.json"]
    assert "curves.png" not in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "below"])
def test_a_report_is_not_written_in_the_place_of_a_file(tmp_path, below):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out is a file: give a folder"):
        report(runs=[write_run(tmp_path / "a", TEST)], out=tmp_path / "out" / below)
    assert (tmp_path / "out").read_text() == "mine"


def test_runs_need_different_names(tmp_path):
    runs = [write_run(tmp_path / x / "run", TEST) for x in "ab"]
    with pytest.raises(ValueError, match="2 runs need as many different names"):
        report(runs=runs, out=tmp_path / "out")


def test_a_log_goes_on_in_its_file_without_a_warning_that_it_would_be_deleted(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2):
            log = CSVLog(tmp_path, name="run", version="a")
            log.log_metrics({"loss": step / 2}, step=step)
            log.save()
    assert [row["loss"] for row in read_metrics(tmp_path / "run" / "a")] == [0.5, 1.0]


@pytest.mark.parametrize("logged", [2, 8, 14, 60])
def test_a_curve_of_few_logged_losses_is_still_a_line(tmp_path, monkeypatch, logged):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axis, x, y, **style: drawn.append(len(y)))
    monkeypatch.setattr(Axes, "legend", lambda axis: None)
    rows = [{"step": 20.0 * step, "train/vqa/loss": 1 / (step + 1)} for step in range(logged)]
    curves({"run": rows}, tmp_path / "a.png")
    assert drawn[0] > logged // 2


def test_a_split_that_differs_between_runs_is_marked():
    whole = {"splits": {"test": {"vqa": {"part": "whole"}}}}
    shuffled = {**whole, "inputs": {"shuffle_features": True}}
    assert splits_of({"a": whole, "b": whole}, "vqa") == "test"
    assert splits_of({"a": shuffled}, "vqa") == "test, features shuffled between images"
    assert splits_of({"a": whole, "b": shuffled}, "vqa") == "test*"
