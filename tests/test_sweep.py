"""Sweeps: shipped files, grid and random points, real local runs, and SLURM replaced by scripts."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.data_modules.tiny_data import DIM, write_world
from vlpet_lightning.__main__ import run
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.commands.sweep import devices_of_points
from vlpet_lightning.pet.serialization import placements_to_plain
from vlpet_lightning.protocol import flattened
from vlpet_lightning.sweeps.demo import at_demo_size
from vlpet_lightning.sweeps.folder import SweepFolder, points_of
from vlpet_lightning.sweeps.plan import ARGS_FILE, SweepError, read_sweep
from vlpet_lightning.sweeps.slurm import _ranges, script

REPOSITORY = Path(__file__).parents[1]
SHIPPED = sorted((REPOSITORY / "experiments/sweeps").glob("*.yaml"))
VLM = REPOSITORY / "experiments/sweeps/vlm_granularity.yaml"
COMMAND = ["${env}", "python", "-m", "vlpet_lightning", "fit", "--config", "tiny.yaml", "--config", ARGS_FILE]
PATIENCE = 120.0


def write_sweep(folder: Path, **changes: Any) -> Path:
    content = {"name": "s", "method": "grid", "metric": {"name": "val/average", "goal": "maximize"}, "command": COMMAND}
    content["parameters"] = {"seed_everything": {"values": [1, 2]}}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (content | changes).items() if value is not None}))
    return path


def telling(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points that are the first to have a value of a setting: together they have all values."""
    found, seen = [], set()
    for point in points:
        values = {json.dumps(setting) for setting in flattened(point)}
        if not values <= seen:
            found.append(point)
            seen |= values
    return found


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["telling", "every"])
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in ("designs", "methods") else []) for path in SHIPPED],
    ids=lambda path: path.stem,
)
def test_every_point_of_a_shipped_sweep_is_a_module(
    path: Path, every: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    sweep = read_sweep(path)
    file = tmp_path / "args.json"
    assert len({json.dumps(point) for point in sweep.points}) == len(sweep.points) > 3
    for point in sweep.points if every else telling(sweep.points):
        file.write_text(json.dumps(point))
        module = module_from_config([str(file) if word == ARGS_FILE else word for word in sweep.words])
        lr = dict(flattened(point)).get("model.init_args.lr", module.lr)
        assert module.lr == lr > 0


@pytest.mark.parametrize("place", [pytest.param(0, marks=pytest.mark.slow), -1], ids=["first", "last"])
@pytest.mark.parametrize("path", [path for path in SHIPPED if path != VLM], ids=lambda path: path.stem)
def test_a_shipped_sweep_has_a_demo_size(
    path: Path, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("vlpet_lightning.sweeps.demo._data", lambda demo: [])
    full, small = read_sweep(path), at_demo_size(read_sweep(path))
    assert (small.slug, len(small.points)) == (f"{full.slug}-demo", len(full.points))
    file = tmp_path / "args.json"
    modules = []
    for sweep in (full, small):
        file.write_text(json.dumps(sweep.points[place]))
        words = [str(file) if word == ARGS_FILE else word for word in sweep.words]
        modules.append(module_from_config(words))
    assert modules[1].backbone_name == "data/demo/backbone"
    assert modules[1].lr == pytest.approx(2 * modules[0].lr)
    wide, narrow = (widths(placements_to_plain(module.placements)) for module in modules)
    assert narrow == [width // 3 for width in wide]


def test_the_demo_of_a_decoder_only_model_keeps_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("vlpet_lightning.sweeps.demo._data", lambda demo: [])
    full, small = read_sweep(VLM), at_demo_size(read_sweep(VLM))
    assert small.points == full.points
    added = ["--config", "experiments/vlm/demo.yaml", "--config", "experiments/sweeps/overlays/demo.yaml"]
    assert small.words == [*full.words[:-2], *added, *full.words[-2:]]


def widths(plain: Any) -> list[int]:
    """Return the ranks in placements as plain data."""
    if isinstance(plain, list):
        return [width for one in plain for width in widths(one)]
    if not isinstance(plain, dict):
        return []
    own = [value for name, value in plain.items() if name == "rank"]
    return own + [width for value in plain.values() for width in widths(value)]


def test_a_demo_without_its_data_or_of_another_experiment_is_one_error(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SweepError, match=r"has no demo size: its command must name experiments/image_text.yaml"):
        run(["sweep", str(write_sweep(workplace)), "--demo"])
    shutil.copytree(REPOSITORY / "experiments", workplace / "experiments")
    with pytest.raises(SweepError, match=r"the demo's data is missing .*: make it by `make demo-data`"):
        run(["sweep", "experiments/sweeps/heads.yaml", "--demo"])
    assert not (workplace / "runs").exists()


def test_the_shipped_sweeps_have_what_wandb_asks_for() -> None:
    for path in SHIPPED:
        content = yaml.safe_load(path.read_text())
        assert content["command"][0] == "${env}"
        assert content["command"][-1] == ARGS_FILE
        assert {"program", "method", "metric", "parameters"} <= content.keys()
    ablations = {"gates", "heads", "rank", "placement", "norms", "designs", "ladder"}
    assert {path.stem for path in SHIPPED} == {"granularity", "vlm_granularity", "lr_seed", "methods"} | ablations


def test_a_grid_is_the_product_of_nested_and_dotted_settings(tmp_path: Path) -> None:
    nested = {"parameters": {"rank": {"values": [8, 16]}, "kind": {"value": "k"}}}
    path = write_sweep(tmp_path, parameters={"a": nested, "b.c": {"values": [None, [1, 2]]}})
    sweep = read_sweep(path)
    assert sweep.points == [
        {"a": {"rank": rank, "kind": "k"}, "b": {"c": c}} for rank in (8, 16) for c in (None, [1, 2])
    ]
    assert sweep.varying == ["a.rank", "b.c"]


def test_random_points_depend_on_the_seed_and_keep_to_their_bounds(tmp_path: Path) -> None:
    parameters = {
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        "rank": {"distribution": "q_uniform", "min": 8, "max": 64, "q": 8},
        "heads": {"min": 1, "max": 4},
        "dropout": {"min": 0.0, "max": 0.5},
        "gate": {"values": ["a", "b"], "probabilities": [1, 0]},
    }
    path = write_sweep(tmp_path, method="random", parameters=parameters, run_cap=40)
    points = read_sweep(path).points
    assert points == read_sweep(path).points
    assert points != read_sweep(path, seed=1).points
    assert points[:5] == read_sweep(path, count=5).points
    for point in points:
        assert 1e-5 <= point["lr"] <= 1e-2
        assert point["rank"] % 8 == 0
        assert point["heads"] in (1, 2, 3, 4)
        assert 0 <= point["dropout"] <= 0.5
        assert point["gate"] == "a"
    assert sum(point["lr"] < 10**-3.5 for point in points) in range(8, 33)  # half of them, on a log scale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, "method is 'bayes', here it can be grid or random"),
        ({"parameters": None}, "has no parameters"),
        ({"parameters": {"lr": {"min": 0, "max": 1}}}, "parameter lr of a grid must have value or a list of values"),
        ({"parameters": {"lr": 3}}, "parameter lr must have value, values or a distribution, got 3"),
        ({"method": "random"}, "a random sweep has no end: give --count, or run_cap"),
        ({"command": ["python"]}, "command must be like"),
        ({"command": ["torchrun", *COMMAND[2:]]}, "command must be like"),
        ({"command": [*COMMAND, "--ckpt_path=x"]}, "must not have --ckpt_path"),
        ({"command": 5}, "command must be like"),
        ({"metrics": {}}, "unknown keys metrics"),
        (
            {"parameters": {"lr": {"value": date(2024, 1, 1)}}},
            r"cannot be written as JSON \(.*date.*\): put it in quotes",
        ),
        (
            {"method": "random", "run_cap": 1, "parameters": {"lr": {"min": "1e-5", "max": 1}}},
            r"numbers min and max, got .*: write 1\.0e-5",
        ),
        ({"metric": {"name": "a", "goal": "up"}}, "a goal of minimize or maximize"),
        (
            {"method": "random", "run_cap": 1, "parameters": {"lr": {"distribution": "beta", "min": 0, "max": 1}}},
            "distribution 'beta', here it can be uniform",
        ),
        *(({"run_cap": cap}, "run_cap must be a whole number of runs, 1 or more") for cap in ("3", 0, 2.5, True)),
        ({"parameters": [1]}, r"has no parameters: .* got \[1\]"),
        (
            {"parameters": {"a": {"value": 1}, "a.b": {"values": [1, 2]}}},
            r"parameters a and a\.b both set a\.b: drop one",
        ),
        (
            {"parameters": {"a.b": {"value": 1}, "a": {"parameters": {"b": {"values": [1, 2]}}}}},
            r"parameters a\.b and a\.b both set a\.b",
        ),
        ({"parameters": {"lr": {"values": []}}}, "parameter lr of a grid must have value or a list of values"),
        *(
            ({"method": "random", "run_cap": 1, "parameters": {"lr": leaf}}, r"drawn for parameter lr from \{")
            for leaf in (
                {"distribution": "log_uniform_values", "min": 0, "max": 1},
                {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0},
                {"distribution": "q_uniform", "min": 3, "max": 4, "q": 5},
                {"values": [1, 2], "probabilities": [1]},
                {"values": 3},
            )
        ),
    ],
)
def test_what_cannot_be_run_here_is_one_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        read_sweep(write_sweep(tmp_path, **changes))


@pytest.fixture
def workplace(tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny experiment."""
    write_world(tmp_path)
    shutil.copytree(tiny_backbone, tmp_path / "backbone")
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    keep = {"filename": "resume", "every_n_train_steps": 1, "enable_version_counter": False}
    experiment = {
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "logger": [
                {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": "runs", "name": "tiny"}}
            ],
            "callbacks": [
                *({"class_path": f"callbacks.{name}"} for name in ("Preemption", "VQAMetrics", "CaptionMetrics")),
                {**checkpoint, "init_args": keep},
            ],
        },
        "model": {
            "class_path": "vlpet_lightning.VLBart",
            "init_args": {
                "backbone": str(tmp_path / "backbone"),
                "feature_dim": DIM,
                "grid": 2,
                "placements": {
                    "class_path": "vlpet_lightning.pet.Granularity",
                    "init_args": {"rank": 8, "value_rank": 8},
                },
                "trainable": ["pet", "visual_embedding"],
            },
        },
        "data": {
            "class_path": "data_modules.ImageTextDataModule",
            "init_args": {"root": str(tmp_path), "tasks": ["vqa"], "batch_size": 3, "eval_batch_size": 3},
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


def granularity(ranks: list[int]) -> dict[str, Any]:
    """A point whose rank is not divisible by four heads fails when the model is built."""
    settings = {"rank": {"values": ranks}, "heads": {"value": 4}, "value_rank": {"value": 8}}
    placements = {"class_path": {"value": "vlpet_lightning.pet.Granularity"}, "init_args": {"parameters": settings}}
    return {"model": {"parameters": {"init_args": {"parameters": {"placements": {"parameters": placements}}}}}}


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_local_sweep_runs_all_points_names_the_failing_and_repeats_none(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(workplace, parameters=granularity([8, 7]))
    with pytest.raises(SystemExit, match="1"):
        run(["sweep", str(path), "--max-parallel", "2"])
    folder = workplace / "runs/sweeps/s"
    results = lines(folder / "results.csv")
    assert [line["state"] for line in results] == ["finished", "failed"]
    assert float(results[0]["val/average"]) >= 0
    assert results[1]["val/average"] == ""
    shown = capsys.readouterr().out
    assert "0001 failed" in shown
    assert "rank" in (folder / "0001/log.txt").read_text().splitlines()[-1]
    logs = {number: (folder / number / "log.txt").read_text() for number in ("0000", "0001")}
    with pytest.raises(SystemExit, match="1"):
        run(["sweep", str(path)])
    assert logs == {number: (folder / number / "log.txt").read_text() for number in logs}
    assert "every point has finished; --retry-failed" in capsys.readouterr().out
    with pytest.raises(SweepError, match="other points or another command"):
        run(["sweep", str(write_sweep(workplace, parameters=granularity([8, 16])))])


def begun(workplace: Path, path: Path) -> subprocess.Popen:
    """Start a sweep in a separate process and wait for the first point's checkpoint."""
    launcher = subprocess.Popen([sys.executable, "-m", "vlpet_lightning", "sweep", str(path)], cwd=workplace)
    end = time.monotonic() + PATIENCE
    while not list(workplace.glob("runs/tiny/s-*_0000/checkpoints/resume.ckpt")) and time.monotonic() < end:
        assert launcher.poll() is None
        time.sleep(0.05)
    return launcher


def epochs_of(workplace: Path) -> int:
    """Return the number of epochs that the first point has completed."""
    (path,) = workplace.glob("runs/tiny/s-*_0000/checkpoints/resume.ckpt")
    return int(torch.load(path, weights_only=True)["epoch"])


def many_epochs(workplace: Path, epochs: int) -> None:
    content = yaml.safe_load((workplace / "tiny.yaml").read_text())
    content["trainer"]["max_epochs"] = epochs
    (workplace / "tiny.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_sweep_that_is_asked_to_end_goes_on_where_it_was(workplace: Path, number: signal.Signals) -> None:
    path = write_sweep(workplace, parameters={"seed_everything": {"values": [3]}})
    many_epochs(workplace, 400)
    launcher = begun(workplace, path)
    assert [line["state"] for line in lines(workplace / "runs/sweeps/s/results.csv")] == ["running"]
    launcher.send_signal(number)
    assert launcher.wait(PATIENCE) != 0
    folder = SweepFolder(workplace / "runs/sweeps/s", read_sweep(path))
    assert folder.state(0) == "interrupted"
    log = (folder.of(0) / "log.txt").read_text()
    assert "asked to end at step" in log
    many_epochs(workplace, epochs_of(workplace) + 1)  # the current epoch is the last
    assert run(["sweep", str(path)]) == 0
    assert folder.state(0) == "finished"
    assert "Restored all states from the checkpoint" in (folder.of(0) / "log.txt").read_text().removeprefix(log)


@pytest.mark.slow
def test_the_runs_of_a_killed_sweep_are_not_started_twice(workplace: Path) -> None:
    path = write_sweep(workplace, parameters={"seed_everything": {"values": [3]}})
    many_epochs(workplace, 2000)
    launcher = begun(workplace, path)
    launcher.kill()
    launcher.wait()
    with pytest.raises(SweepError, match=r"a run of one that was killed, is still going \(0000 in process \d+\)"):
        run(["sweep", str(path)])
    subprocess.run(["pkill", "-KILL", "-f", str(workplace / "runs/sweeps/s/0000/args.json")], check=True)
    many_epochs(workplace, epochs_of(workplace) + 1)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            assert run(["sweep", str(path)]) == 0
            break
        except SweepError:
            time.sleep(0.2)
    assert SweepFolder(workplace / "runs/sweeps/s", read_sweep(path)).state(0) == "finished"


def test_a_dry_run_parses_every_point_and_writes_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(workplace, parameters=granularity([8, 16]))
    assert run(["sweep", str(path), "--dry-run"]) == 0
    assert "2 points, all of them valid" in capsys.readouterr().out
    assert not (workplace / "runs").exists()


def test_a_misspelt_setting_stops_a_sweep_before_its_first_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(workplace, parameters={"model.init_args.learning_rate": {"values": [1, 2]}})
    with pytest.raises(SystemExit):
        run(["sweep", str(path)])
    assert "learning_rate" in capsys.readouterr().err
    assert not (workplace / "runs").exists()


SBATCH = """\
#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
text = open(script).read()
numbers = []
for part in re.search(r"--array=([0-9,-]+)%", text)[1].split(","):
    first, _, last = part.partition("-")
    numbers += range(int(first), int(last or first) + 1)
for number in numbers:
    environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(number), SLURM_ARRAY_JOB_ID="77")
    subprocess.run(["bash", script], env=environment)
print("77;cluster")
"""


def with_last_checkpoint(workplace: Path) -> None:
    content = yaml.safe_load((workplace / "tiny.yaml").read_text())
    last = {"filename": "last", "enable_version_counter": False}
    content["trainer"]["callbacks"].append(
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": last}
    )
    (workplace / "tiny.yaml").write_text(yaml.safe_dump(content))


def with_scores(workplace: Path) -> int:
    """Return the number of runs with test scores."""
    return sum("test/average" in path.read_text() for path in workplace.glob("runs/tiny/*/metrics.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("points", [1, 2])
def test_a_sweep_with_tests_tests_each_point_once_also_if_it_was_trained_without(
    workplace: Path, capsys: pytest.CaptureFixture[str], points: int
) -> None:
    with_last_checkpoint(workplace)
    path = write_sweep(workplace, parameters={"seed_everything": {"values": [1, 2][:points]}})
    assert run(["sweep", str(path), "--max-parallel", "2"]) == 0
    assert with_scores(workplace) == 0
    folder = workplace / "runs/sweeps/s"
    trained = {path.name: (path / "log.txt").read_text() for path in folder.glob("0*")}
    if points == 2:
        (folder / "0001" / "ended").write_text("1\n")  # as if its training had failed
    assert run(["sweep", str(path), "--test", "--retry-failed"]) == 0
    assert with_scores(workplace) == points
    logs = {path.name: (path / "log.txt").read_text() for path in folder.glob("0*")}
    assert len(logs) == points
    assert all(logs[name].startswith(trained[name]) for name in logs)
    assert {(folder / name / "tested").read_text() for name in logs} == {"0\n"}
    assert run(["sweep", str(path), "--test"]) == 0
    assert "every point has finished" in capsys.readouterr().out
    assert logs == {path.name: (path / "log.txt").read_text() for path in folder.glob("0*")}


def test_a_test_that_fails_is_a_failed_point_whose_training_is_kept(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(workplace, parameters={"seed_everything": {"values": [1]}})  # no checkpoint `last`
    with pytest.raises(SystemExit, match="1"):
        run(["sweep", str(path), "--test"])
    folder = workplace / "runs/sweeps/s/0000"
    assert ((folder / "ended").read_text(), (folder / "tested").read_text() != "0\n") == ("0\n", True)
    assert "no last checkpoint" in capsys.readouterr().out
    with_last_checkpoint(workplace)
    with pytest.raises(SystemExit, match="1"):
        run(["sweep", str(path), "--test", "--retry-failed"])
    assert (folder / "ended").read_text() == "0\n"  # not trained again


def test_slurm_gets_one_array_and_its_results_come_back(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = workplace / "bin"
    programs.mkdir()
    for name, text in {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": '#!/bin/bash\nshift\nexec "$@"\n',
        "squeue": "#!/bin/bash\ncat waiting 2>/dev/null; exit 0\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = write_sweep(workplace, parameters={"seed_everything": {"values": [1]}})
    before = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(workplace / "nowhere"))  # SLURM may be installed here
    with pytest.raises(SweepError, match="sbatch is not there"):
        run(["sweep", str(path), "--launcher", "slurm"])
    monkeypatch.setenv("PATH", f"{programs}:{before}")
    (workplace / "head").write_text("#SBATCH --gpus=1\n")
    with_last_checkpoint(workplace)
    words = ["sweep", str(path), "--launcher", "slurm", "--max-parallel", "3", "--sbatch", "head", "--test"]
    assert run(words) == 0
    script = (workplace / "runs/sweeps/s/sweep.sbatch").read_text()
    assert "#SBATCH --array=0%3" in script
    assert "#SBATCH --gpus=1" in script
    assert "as job 77" in capsys.readouterr().out
    assert [line["state"] for line in lines(workplace / "runs/sweeps/s/results.csv")] == ["finished"]
    assert with_scores(workplace) == 1
    assert run(words) == 0
    assert "every point has finished" in capsys.readouterr().out
    assert with_scores(workplace) == 1


def test_what_waits_in_the_queue_is_not_submitted_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = workplace / "bin"
    programs.mkdir()
    for name, text in {"sbatch": "echo x >> submitted; echo 5", "squeue": "cat waiting"}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    path = write_sweep(workplace)
    assert run(["sweep", str(path), "--launcher", "slurm"]) == 0
    (workplace / "waiting").write_text("0 R\n1 PD\n")
    for launcher in ("slurm", "local"):
        assert run(["sweep", str(path), "--launcher", launcher]) == 0
        assert "job 5 has waiting or running points: nothing was started" in capsys.readouterr().out
        states = [line["state"] for line in lines(workplace / "runs/sweeps/s/results.csv")]
        assert states == ["running", "waiting"]
    (workplace / "waiting").write_text("")
    assert run(["sweep", str(path), "--launcher", "slurm"]) == 0
    assert (workplace / "submitted").read_text() == "x\nx\n"


def test_points_share_out_the_gpus_that_were_given_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, expected in ((None, ["0", "1"]), ("4, 6", ["4", "6"]), ("GPU-a,GPU-b,-1,5", ["GPU-a", "GPU-b"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert devices_of_points(4) == expected
    assert devices_of_points(1) == []


def test_a_name_with_spaces_is_one_word_for_slurm(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out", read_sweep(write_sweep(tmp_path, name="lr and seed")))
    text = script(folder, [0], at_once=1, lines="")
    assert shlex.split(next(line for line in text.splitlines() if "job-name" in line))[1:] == ["--job-name=lr and seed"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"on: 1\nmethod: grid\n", "unknown keys True"), (b"name: \xff", "is not valid YAML")]
)
def test_a_file_that_yaml_reads_in_another_way_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "sweep.yaml").write_bytes(content)
    with pytest.raises(SweepError, match=message):
        read_sweep(tmp_path / "sweep.yaml")


def test_sweeps_of_one_name_in_two_folders_have_runs_of_their_own(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, name="a/b c"))
    one, other = SweepFolder(tmp_path / "one", sweep), SweepFolder(tmp_path / "other", sweep)
    names = {folder.run_name(number) for folder in (one, other) for number in (0, 1)}
    assert len(names) == 4
    assert all(re.fullmatch(r"a-b-c-[0-9a-f]{6}_000[01]", name) for name in names)
    assert SweepFolder(tmp_path / "one", sweep).run_name(1) == one.run_name(1) in (one.of(1) / "command.sh").read_text()


def test_a_sweep_can_grow_and_keeps_its_runs(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, method="random", parameters={"seed_everything": {"min": 0, "max": 10**6}})
    folders = [SweepFolder(tmp_path / "out", read_sweep(path, count=count)) for count in (1, 3, 2)]
    assert len({folder.run_name(0) for folder in folders}) == 1
    assert points_of(tmp_path / "out") == 3
    for number, point in enumerate(folders[1].sweep.points):
        assert json.loads((tmp_path / f"out/{number:04d}/args.json").read_text()) == point
    with pytest.raises(SweepError, match="other points or another command"):
        SweepFolder(tmp_path / "out", read_sweep(path, count=3, seed=1))
    (tmp_path / "file").touch()
    with pytest.raises(SweepError, match="is a file, or below one: give --out a folder"):
        SweepFolder(tmp_path / "file", read_sweep(path, count=1))


@pytest.mark.parametrize(("goal", "order"), [("maximize", [3, 0, 1, 2]), ("minimize", [1, 0, 3, 2])])
def test_the_best_come_first_and_what_is_no_number_last(tmp_path: Path, goal: str, order: list[int]) -> None:
    metric = {"name": "val/average", "goal": goal}
    path = write_sweep(tmp_path, metric=metric, parameters={"seed_everything": {"values": [0, 1, 2, 3]}})
    folder = SweepFolder(tmp_path / "out", read_sweep(path))
    for number, value in enumerate(("0.5", "0.2", "nan", "0.9")):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "metrics.csv").write_text(f"step,val/average\n1,{value}\n")
        (folder.of(number) / "run.txt").write_text(str(tmp_path / f"run{number}"))
    assert [outcome.number for outcome in folder.outcomes()] == order


def test_points_that_are_the_same_are_said(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, parameters={"seed_everything": {"values": [1, 1, 2]}}))
    assert sweep.notes == ["only 2 of the 3 points are different: some are run several times"]


def test_steps_of_a_distribution_stay_within_its_bounds(tmp_path: Path) -> None:
    leaf = {"distribution": "q_log_uniform_values", "min": 1, "max": 63, "q": 8}
    path = write_sweep(tmp_path, method="random", parameters={"rank": leaf})
    assert {point["rank"] for point in read_sweep(path, count=60).points} <= {8, 16, 24, 32, 40, 48, 56}


def test_numbers_are_written_as_slurm_does() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert _ranges([3]) == "3"
    assert _ranges([9, 10, 11, 12, 20]) == "9-12,20"
