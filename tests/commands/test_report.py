"""Tables and figures of finished runs."""

from __future__ import annotations

import csv
import json
import warnings

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from tests.reports.run_folders import make_record
from tests.reports.run_folders import write_run as write_folder
from vlpet_lightning.__main__ import run
from vlpet_lightning.commands.report import report
from vlpet_lightning.loggers import CSVLog, read_metrics
from vlpet_lightning.reports.runs import read_scores

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
    for name, size in (("COCO/a.png", (20, 20)), ("nlvr/l.jpg", (30, 20)), ("nlvr/r.png", (20, 45))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(path)
    return tmp_path / "images"


def table_of(page):
    return page.partition("## All metrics")[2].partition("## Protocol")[0].strip().splitlines()


def test_the_table_of_all_metrics_has_each_score_and_the_average_of_those_that_stand_for_a_task(tmp_path):
    report([write_run(tmp_path / "a", TEST), write_run(tmp_path / "b", {"test/vqa/accuracy": 5.0})], tmp_path / "out")
    assert table_of((tmp_path / "out/report.md").read_text()) == [
        "| task | split | metric | scale | a | b |",
        "| --- | --- | --- | --- | ---: | ---: |",
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
    report(write_run(tmp_path / "a", undefined), tmp_path / "out")
    assert table_of((tmp_path / "out/report.md").read_text())[-1] == "| average |  |  |  |  |"


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
    written = {"report.md", "index.html", "table.tex", "table.csv", "runs.csv", "scores.json", "contact_sheet.png"}
    written |= {f"{name}.{kind}" for name in ("curves", "profile") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written  # without records, no parameter counts
    sheet, curves = (Image.open(tmp_path / "out" / name) for name in ("contact_sheet.png", "curves.png"))
    assert sheet.height > 2.5 * curves.height / 2  # three tasks, one row each
    assert len(sheet.convert("RGB").getcolors(1 << 20)) > 10


def test_an_image_that_is_missing_is_named(tmp_path, images):
    (images / "nlvr" / "r.png").unlink()
    runs = [write_run(tmp_path / "a", TEST, [("nlvr2", ["l", "r"], {"label": "true", "identifier": "x"})])]
    with pytest.raises(FileNotFoundError, match="--images: no image nlvr/r: give the folder"):
        report(runs=runs, out=tmp_path / "out", images=images)
    assert plt.get_fignums() == []


def test_a_run_that_was_not_tested_is_named_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no test scores in .*run `python -m vlpet_lightning test"):
        report(runs=[write_run(tmp_path / "a", {})], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_tested_alone_has_no_curves(tmp_path, capsys):
    folder = write_run(tmp_path / "a", TEST, fitted=False)
    assert run(["report", "--runs", str(folder), "--out", str(tmp_path / "out")]) == 0  # a single path is a list of one
    texts = ["index.html", "report.md", "runs.csv", "scores.json", "table.csv", "table.tex"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == texts
    assert "curves.png" not in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "below"])
def test_a_report_is_not_written_in_the_place_of_a_file(tmp_path, below):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out is a file: give a folder"):
        report(runs=[write_run(tmp_path / "a", TEST)], out=tmp_path / "out" / below)
    assert (tmp_path / "out").read_text() == "mine"


def test_each_run_needs_a_name(tmp_path):
    runs = [write_run(tmp_path / x / "run", TEST) for x in "ab"]
    with pytest.raises(ValueError, match="2 runs need as many names, got 1"):
        report(runs=runs, out=tmp_path / "out", names=["a"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run to report"),
        (["RUN", "--resamples", "-1"], "--resamples must be 0 or more, got -1"),
        (["RUN", "--baseline", "x"], "there is no row 'x' to compare with: choose one of a"),
    ],
)
def test_options_out_of_range_are_one_error_and_write_nothing(tmp_path, words, message):
    folder = write_run(tmp_path / "a", TEST)
    words = [str(folder) if word == "RUN" else word for word in words]
    with pytest.raises(ValueError, match=message):
        run(["report", *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_intervals_are_printed_and_written(tmp_path, capsys):
    paths = []
    for name, share in (("good", 18), ("bad", 4)):
        right = {"gqa": [True] * share + [False] * (20 - share)}
        placed = [{"rank": share}]
        paths.append(
            str(write_folder(tmp_path / name, record=make_record(tasks=("gqa",)), right=right, placements=placed))
        )
    assert run(["report", *paths, "--out", str(tmp_path / "out"), "--baseline", "bad", "--resamples", "500"]) == 0
    assert "paired bootstrap" in " ".join(capsys.readouterr().out.split())
    content = json.loads((tmp_path / "out/scores.json").read_text())
    interval = content["differences_to_baseline"]["good"]["gqa"]
    assert interval["difference"] == pytest.approx(70.0)
    assert interval["questions"][0] > 40
    assert "+70.00 [" in (tmp_path / "out/report.md").read_text()
    assert run(["report", *paths, "--out", str(tmp_path / "none"), "--resamples", "0"]) == 0
    assert json.loads((tmp_path / "none/scores.json").read_text())["differences_to_baseline"] == {}
    assert "paired bootstrap" not in (tmp_path / "none/report.md").read_text()


def test_a_log_goes_on_in_its_file_without_a_warning_that_it_would_be_deleted(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2):
            log = CSVLog(tmp_path, name="run", version="a")
            log.log_metrics({"loss": step / 2}, step=step)
            log.save()
    assert [row["loss"] for row in read_metrics(tmp_path / "run" / "a")] == [0.5, 1.0]


def test_a_split_that_differs_between_runs_is_marked(tmp_path):
    blind = make_record(inputs={"shuffle_features": True})
    for name, record in (("a", make_record()), ("b", blind)):
        write_folder(tmp_path / name, {"vqa/accuracy": 50.0}, record)
    report(tmp_path / "a", tmp_path / "one")
    assert "| vqa | test | accuracy |" in (tmp_path / "one/report.md").read_text()
    report(tmp_path / "b", tmp_path / "other")
    assert "| vqa | test, features shuffled between images |" in (tmp_path / "other/report.md").read_text()
    report([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert "| vqa | test* | accuracy |" in (tmp_path / "both/report.md").read_text()
