"""The table: measured and published rows, differences, marks, bootstrap, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.reports.run_folders import TASKS, all_scores, make_record, write_run
from vlpet_lightning.published import recipes
from vlpet_lightning.published.rows import ROWS
from vlpet_lightning.reports.comparison import Comparison
from vlpet_lightning.reports.groups import group_runs
from vlpet_lightning.reports.runs import find_runs


def compare(*paths: Path, baseline: str | None = None, names: list[str] | None = None) -> Comparison:
    runs, untested = find_runs(list(paths))
    return Comparison(group_runs(runs, names), untested, baseline)


def published_record(key: str, **changes: Any) -> dict[str, Any]:
    """Return the record of a run that can be compared with a published row."""
    recipe = recipes()[key]
    samples = {"vqa": 26280, "gqa": 12578, "nlvr2": 6967, "caption": 5000}
    tests = {
        task: {
            "part": "whole",
            "samples": samples[task],
            "published_samples": samples[task],
            "store": {"name": "COCO", "extractor": {"model": "RN101", "pretrained": "openai"}},
        }
        for task in TASKS
    }
    return make_record(
        splits={"test": tests},
        training=recipe["training"],
        items={"prompts": recipe["prompts"]},
        backbone={"kind": recipe["kind"], **recipe["backbone"], "checksums": {}},
        method={"published": key},
        **changes,
    )


def test_a_comparable_run_has_its_published_row_and_the_difference_below_it(tmp_path: Path) -> None:
    write_run(tmp_path / "a", all_scores(66.5, 120.0), published_record("vlpet_large/bart"))
    lines, notes = compare(tmp_path).lines()
    assert [line.kind for line in lines] == ["measured", "published", "difference"]
    assert [round(value.mean, 2) for value in lines[1].values if value] == [66.17, 55.11, 73.43, 122.03, 79.18]
    assert (lines[1].percent, lines[1].seeds, lines[1].notes) == (4.16, 3, ("a",))
    assert [round(value.mean, 2) for value in lines[2].values if value] == [0.33, -5.11, -3.43, -2.03, -2.56]
    assert notes == ["VL-PET (ICCV 2023), table 2; not measured here"]


def test_a_run_of_another_recipe_has_the_reasons_and_no_difference(tmp_path: Path) -> None:
    record = published_record("vlpet_large/bart")
    record["training"] = {**record["training"], "lr": 0.5}
    write_run(tmp_path / "a", all_scores(66.5), record)
    lines, notes = compare(tmp_path).lines()
    assert [line.kind for line in lines] == ["measured", "published"]
    assert lines[1].notes == ("a", "b")
    assert notes[1] == "not comparable with the row above: lr 0.5 instead of 0.001"


def test_reasons_that_all_published_rows_share_stand_in_one_note(tmp_path: Path) -> None:
    for key in ("vlpet_large/bart", "vlpet_small/bart", "lora/bart"):
        record = published_record(key)
        more = {"lr": 0.5} if key == "lora/bart" else {}
        record["training"] = {**record["training"], "max_epochs": 2, **more}
        write_run(tmp_path / key.partition("/")[0], all_scores(66.5), record)
    lines, notes = compare(tmp_path).lines()
    marks = {line.label.removeprefix("published: "): line.notes for line in lines if line.kind == "published"}
    shared = notes.index("not comparable with the row above: max_epochs 2 instead of 20")
    assert all("abcdef"[shared] in some for some in marks.values())
    assert sum("lr 0.5" in note for note in notes) == 1
    assert sum("max_epochs" in note for note in notes) == 1


def test_the_best_comparable_row_is_bold_and_the_baseline_is_full_fine_tuning(tmp_path: Path) -> None:
    write_run(tmp_path / "full", all_scores(60), make_record(percent=100.0, method={"published": "full/bart"}))
    write_run(tmp_path / "good", all_scores(65), make_record(method={"published": "lora/bart"}), placements=[])
    blind = make_record(inputs={"shuffle_features": True}, method={"published": "bitfit/bart"})
    write_run(tmp_path / "blind", all_scores(99), blind)
    found = compare(tmp_path)
    assert found.reference.label == "Full FT"
    lines = {line.label: line for line in found.lines()[0] if line.kind == "measured"}
    assert 0 in lines["LoRA"].bold
    assert not lines["BitFit, features shuffled between images"].bold
    assert [group.label for group in found.comparable] == ["Full FT", "LoRA"]
    (reason,) = found.against["BitFit, features shuffled between images"]
    assert reason == "control: features shuffled between images"
    assert compare(tmp_path, baseline="LoRA").reference.label == "LoRA"
    with pytest.raises(ValueError, match="there is no row 'x' to compare with: choose one of"):
        compare(tmp_path, baseline="x")


def test_rows_of_another_split_protocol_or_data_are_marked(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"usual{seed}", all_scores(60), make_record(seed=seed))
    base = make_record()
    tests = base["splits"]["test"]
    changes: dict[str, dict[str, Any]] = {
        "part": {"splits": {"test": {**tests, "vqa": {**tests["vqa"], "part": "limit_test_batches 2"}}}},
        "data": {"splits": {"test": {**tests, "gqa": {**tests["gqa"], "annotations": {"gqa.json": "c" * 64}}}}},
        "protocol": {"protocol": "corrected"},
        "training": {"trained": {**base["trained"], "splits": {"train": {**tests, "vqa": {"annotations": {}}}}}},
        "decoding": {"generation": {**base["generation"], "caption": {"beams": 1, "max_length": 20}}},
    }
    for name, change in changes.items():
        write_run(tmp_path / name, all_scores(60), make_record(**change))
    write_run(tmp_path / "none", all_scores(60))
    paths = [tmp_path / name for name in ("usual1", "usual2", *changes, "none")]
    found = compare(*paths, names=["usual", "usual", *changes, "none"])
    assert found.against["usual"] == []
    assert [reason.split(":")[0] for reason in found.against["part"]] == ["split"]
    assert "limit_test_batches 2" in found.against["part"][0]
    assert found.against["data"] == ["test data of gqa"]
    assert found.against["training"] == ["training data of vqa"]
    assert found.against["protocol"] == ["protocol: corrected, usually original"]
    assert found.against["decoding"] == [
        "decoding: caption greedy, at most 20 tokens, usually first step",
    ]
    assert any("protocol record" in reason for reason in found.against["none"])


def test_tasks_that_were_tested_under_different_records_are_marked(tmp_path: Path) -> None:
    for name in ("a", "b", "mixed"):
        write_run(tmp_path / name, all_scores(60), make_record(), placements=[name])
    other = make_record(versions={"torch": "2.14.0"})
    (tmp_path / "mixed/protocol-older.json").write_text(json.dumps(other))
    metrics = tmp_path / "mixed/metrics.csv"
    names = "test/gqa/accuracy,protocol,test/vqa/accuracy_original"
    metrics.write_text(f"{names}\n,{other['digest']},60.0\n50.0,{make_record()['digest']},\n")
    against = compare(tmp_path).against
    assert [label for label, reasons in against.items() if "tasks tested under different" in "".join(reasons)] == [
        "mixed"
    ]


def test_other_versions_seeds_and_untested_runs_are_warnings(tmp_path: Path) -> None:
    other = [{"at": ["encoder.ffn"], "unit": {"class_path": "X"}}]
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", all_scores(60), make_record(seed=seed))
    write_run(tmp_path / "b", all_scores(60), make_record(versions={"torch": "2.14.0"}), placements=other)
    write_run(tmp_path / "c")
    found = compare(tmp_path)
    assert not any(found.against.values())
    assert any("versions of torch differ: usually 2.13.0, 2.14.0 (b)" in text for text in found.warnings)
    assert any("numbers of seeds differ: most rows have 2, b 1" in text for text in found.warnings)
    assert any("1 runs have no test scores and are left out" in text for text in found.warnings)


def test_a_run_without_one_of_the_tasks_has_no_average_beside_those_that_have_all(tmp_path: Path) -> None:
    write_run(tmp_path / "a", all_scores(60), make_record())
    write_run(tmp_path / "b", {"vqa/accuracy_original": 70.0}, make_record(tasks=("vqa",)))
    values = {line.label: line.values for line in compare(tmp_path).lines()[0]}
    assert [value is None for value in values["b"]] == [False, True, True, True, True]
    assert values["a"][-1] is not None


def test_the_bootstrap_compares_every_row_with_the_baseline(tmp_path: Path) -> None:
    good, bad = [True] * 18 + [False] * 2, [True] * 4 + [False] * 16
    for name, right, rank in (("good", good, 1), ("bad", bad, 2)):
        for seed in (1, 2):
            both = {"gqa": right, "nlvr2": right}
            record = make_record(seed=seed, tasks=("gqa", "nlvr2"))
            write_run(tmp_path / f"{name}{seed}", record=record, right=both, placements=[{"rank": rank}])
    found = compare(tmp_path)
    found.bootstrap(400, 0)
    assert found.reference.label == "good1"
    (intervals,) = found.intervals.values()
    assert intervals.keys() == {"gqa", "nlvr2", "average"}
    for interval in intervals.values():
        assert interval.difference == pytest.approx(-70)
        assert interval.excludes_zero
        assert interval.seeds is not None
    (tmp_path / "bad1/predictions/test_gqa.json").unlink()
    found = compare(tmp_path)
    found.bootstrap(10, 0)
    (intervals,) = found.intervals.values()
    assert intervals.keys() == {"nlvr2"}
    assert "there is no" in found.left_out["gqa"]


def test_a_method_at_other_settings_stands_beside_its_published_row_by_the_name_of_its_overlay(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", all_scores(60), make_record())
    point = tmp_path / "sweep" / "0000"
    point.mkdir(parents=True)
    (point / "run.txt").write_text(str(run))
    (point / "args.json").write_text(json.dumps({"overlays": ["experiments/pet/lora.yaml"]}))
    lines, notes = compare(tmp_path / "sweep").lines()
    row = next(row for row in ROWS if row.key == "lora/bart")
    assert [line.kind for line in lines] == ["measured", "published"]
    assert lines[1].percent == row.trained
    assert any("other settings than the published ones" in note for note in notes)
