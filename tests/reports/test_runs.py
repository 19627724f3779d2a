"""Finding runs, and grouping those that differ only in their seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.reports.run_folders import LARGE, all_scores, make_record, write_run
from vlpet_lightning.reports.groups import group_runs
from vlpet_lightning.reports.runs import ReportError, find_runs

OTHER = [{"at": ["encoder.ffn"], "unit": {"class_path": "vlpet_lightning.pet.VLPET", "init_args": {"rank": 48}}}]


def labels(paths: list[Path]) -> dict[str, int]:
    return {group.label: len(group.runs) for group in group_runs(find_runs(paths)[0])}


def point(sweep: Path, number: int, run: Path, **settings: object) -> None:
    folder = sweep / f"{number:04d}"
    folder.mkdir(parents=True)
    (folder / "run.txt").write_text(f"{run}\n")
    (folder / "args.json").write_text(json.dumps(settings))


def test_runs_are_found_at_any_depth_and_each_once(tmp_path: Path) -> None:
    for name in ("x/version_0", "x/version_1", "y"):
        write_run(tmp_path / name, all_scores(60))
    write_run(tmp_path / "z")
    runs, untested = find_runs([tmp_path, tmp_path / "y"])
    assert [run.folder.relative_to(tmp_path).as_posix() for run in runs] == ["x/version_0", "x/version_1", "y"]
    assert [path.name for path in untested] == ["z"]


def test_a_folder_that_is_missing_empty_or_untested_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nothing"):
        find_runs([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no run in .*empty"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match=r"no test scores in .*run `python -m vlpet_lightning test"):
        find_runs([write_run(tmp_path / "z")])


def test_a_sweep_names_its_runs_also_after_the_project_has_moved(tmp_path: Path) -> None:
    home = tmp_path / "home"
    runs = [write_run(home / "runs" / f"s_{n}", all_scores(60 + n), make_record(seed=n)) for n in range(2)]
    for number, run in enumerate(runs):
        point(home / "runs/sweeps/s", number, run.absolute(), seed_everything=number)
    assert len(find_runs([home / "runs/sweeps/s"])[0]) == 2
    shutil.move(home, tmp_path / "moved")
    found, untested = find_runs([tmp_path / "moved/runs/sweeps/s"])
    assert ([run.folder.name for run in found], untested) == (["s_0", "s_1"], [])
    assert [run.point["seed_everything"] for run in found] == [0, 1]
    for order in ([tmp_path / "moved"], [tmp_path / "moved/runs/sweeps", tmp_path / "moved/runs"]):
        found, _ = find_runs(order)  # by their own folders and by the sweep
        assert sorted(run.point["seed_everything"] for run in found) == [0, 1]


def test_run_folders_below_the_working_directory_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point(tmp_path / "sweep", 0, write_run(tmp_path / "run", all_scores(60)))
    assert find_runs([tmp_path / "sweep"])[0][0].folder == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert find_runs([Path("sweep")])[0][0].folder == Path("run")


def test_runs_that_differ_only_in_their_seed_are_one_group(tmp_path: Path) -> None:
    for name, seed in (("a0", 2), ("a1", 1)):
        write_run(tmp_path / name, all_scores(60 + seed), make_record(seed=seed))
    write_run(tmp_path / "b", all_scores(70), make_record(seed=1), placements=OTHER)
    write_run(tmp_path / "c", all_scores(70), make_record(seed=1, training={"lr": 0.01}))
    groups = group_runs(find_runs([tmp_path])[0])
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2], [1], [1]]
    score = groups[0].score("vqa")
    assert score is not None
    assert (score.mean, round(score.std or 0, 4)) == (61.5, 0.7071)
    average = groups[0].average()
    assert average is not None
    assert average.mean == pytest.approx((61.5 + 50 + 70 + 110) / 4)


def test_a_score_that_one_of_the_runs_lacks_has_no_mean(tmp_path: Path) -> None:
    for seed in (1, 2):
        scores = all_scores(60)
        if seed == 2:
            del scores["nlvr2/consistency"], scores["caption/cider"]
        write_run(tmp_path / str(seed), scores, make_record(seed=seed))
    (group,) = group_runs(find_runs([tmp_path])[0])
    assert group.score("vqa") is not None
    assert group.score("caption") is None
    assert group.score("nlvr2", "consistency") is None


def test_groups_are_named_by_overlay_settings_or_folder(tmp_path: Path) -> None:
    pet = "experiments/pet/vlpet_large.yaml"
    shuffled = {"inputs": {"shuffle_features": True}}
    for number, (settings, changes) in enumerate(
        [
            ({"overlays": [pet]}, {}),
            ({"overlays": ["experiments/sweeps/overlays/blind_control.yaml"]}, shuffled),
            ({"overlays": [pet], "model": {"init_args": {"lr": 0.1}}}, {"training": {"lr": 0.1}}),
        ]
    ):
        run = write_run(tmp_path / f"runs/{number}", all_scores(60), make_record(**changes))
        point(tmp_path / "sweep", number, run, seed_everything=1, **settings)
    assert list(labels([tmp_path / "sweep"])) == ["VL-PET-large", "blind control", "VL-PET-large, lr=0.1"]
    for number, rank in enumerate((48, 96)):
        unit = [{**LARGE[0], "rank": rank}]
        run = write_run(tmp_path / f"ranks/{number}", all_scores(60), make_record(), placements=unit)
        point(tmp_path / "rank_sweep", number, run, model={"init_args": {"placements": {"rank": rank}}})
    assert list(labels([tmp_path / "rank_sweep"])) == ["rank=48", "rank=96"]
    assert list(labels([tmp_path / "ranks"])) == ["0", "1"]
    known = make_record(method={"published": "lora/bart"})
    blind = make_record(method={"published": "lora/bart"}, **shuffled)
    for name, record in (("known", known), ("blind", blind)):
        write_run(tmp_path / "methods" / name, all_scores(60), record)
    assert sorted(labels([tmp_path / "methods"])) == ["LoRA", "LoRA, features shuffled between images"]


def test_names_decide_and_runs_of_one_name_must_have_the_same_settings(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"a{seed}", all_scores(60), make_record(seed=seed)) for seed in (1, 2)]
    runs, _ = find_runs(paths)
    assert [len(group.runs) for group in group_runs(runs, ["x", "x"])] == [2]
    assert [group.label for group in group_runs(runs, ["x", "y"])] == ["x", "y"]
    with pytest.raises(ReportError, match="2 runs need as many names, got 1"):
        group_runs(runs, ["x"])
    other, _ = find_runs([write_run(tmp_path / "b", all_scores(60), make_record(), placements=OTHER)])
    with pytest.raises(ReportError, match="have the name 'x' and different settings"):
        group_runs([*runs, *other], ["x", "x", "x"])


def test_runs_without_config_and_record_are_not_merged(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name, all_scores(60), placements=None)
    assert labels([tmp_path]) == {"a": 1, "b": 1}
