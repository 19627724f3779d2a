"""The ``gates`` command on runs trained through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from tests.data_modules.tiny_data import DIM, write_world
from tests.runs import make_batch
from vlpet_lightning.__main__ import run
from vlpet_lightning.cli import data_from_config, module_from_config
from vlpet_lightning.commands.export import load_checkpoint
from vlpet_lightning.commands.gates import _batches, _load, _names, first_samples
from vlpet_lightning.gates import encode_with_gates
from vlpet_lightning.protocol import read_record

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
METHODS = {"large": "vlpet_large.yaml", "middle_x": "vlpet_middle_x.yaml", "lora": "lora.yaml"}


class Runs(NamedTuple):
    """Folders of three runs on the tiny world, and its pictures."""

    root: Path
    pictures: Path

    def checkpoint(self, name: str) -> Path:
        return self.root / "run" / name / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Runs:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    for store in ("COCO", "nlvr"):
        (root / "pictures" / store).mkdir(parents=True)
        for number, name in enumerate(np.load(root / "features" / store / "ids.npy").astype(str).tolist()):
            Image.new("RGB", (20, 16), (10 * number % 255, 90, 0)).save(root / "pictures" / store / f"{name}.png")
    overlay = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "logger": {
                "class_path": "vlpet_lightning.loggers.CSVLog",
                "init_args": {"save_dir": str(root), "name": "run"},
            },
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
            ],
            "limit_val_batches": 0,
        },
        "model": {"init_args": {"backbone": str(tiny_backbone), "feature_dim": DIM, "grid": 2, "lr": 0.05}},
        "data": {"init_args": {"root": str(root), "batch_size": 3, "eval_batch_size": 3, "tasks": ["vqa", "nlvr2"]}},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    for name, file in METHODS.items():
        configs = [EXPERIMENTS / "image_text.yaml", EXPERIMENTS / "pet" / file, root / "tiny.yaml"]
        words = [word for path in configs for word in ("--config", str(path))]
        assert run(["fit", *words, "--trainer.logger.init_args.version", name]) == 0
    return Runs(root, root / "pictures")


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "gates.csv").open()))


@pytest.fixture(scope="module")
def report(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the run with the large gate, with pictures."""
    out = tmp_path_factory.mktemp("reports") / "large"
    assert run(["gates", *at(runs, "large"), "--out", str(out), "--images", str(runs.pictures)]) == 0
    return out


def at(runs: Runs, name: str) -> list[str]:
    return ["--ckpt_path", str(runs.checkpoint(name)), "--device", "cpu"]


def test_the_report_has_the_statistics_of_the_split(runs: Runs, report: Path) -> None:
    words = ["--config", str(runs.root / "run" / "large" / "config.yaml")]
    module: Any = module_from_config(words)
    load_checkpoint(module, runs.checkpoint("large"), 42)
    data: Any = data_from_config(words)
    data.setup("test")
    factors: dict[tuple[str, str, int, str], list[torch.Tensor]] = {}
    for batch in data.test_dataloader():
        gates = encode_with_gates(module.built(), batch)
        for (site, layer), found in gates.factors.items():
            for kind, mask in gates.kinds.items():
                factors.setdefault((batch.task, site, layer, kind), []).append(found[mask].flatten())
    rows = {(r["task"], r["site"], int(r["layer"]), r["kind"]): r for r in rows_of(report)}
    for key, parts in factors.items():
        values = torch.cat(parts).double()
        if not len(values):
            assert key not in rows
            continue
        assert int(rows[key]["count"]) == len(values)
        assert float(rows[key]["mean"]) == pytest.approx(float(values.mean()), rel=1e-9)
        assert float(rows[key]["std"]) == pytest.approx(float(values.std(unbiased=False)), rel=1e-6)
        assert rows[key]["gate"] == "LargeGate"
    assert len({task for task, *_ in rows}) == 2
    assert {row["mean"] for row in rows.values() if row["kind"] == "text"} != {"0.5"}


def test_the_report_names_its_run_and_protocol(runs: Runs, report: Path) -> None:
    content = json.loads((report / "gates.json").read_text())
    (own,) = content["runs"]
    assert content["split"] == "test"
    assert own["samples"] == {"vqa": 4, "nlvr2": 4}
    record = read_record(runs.root / "run" / "large" / "protocol.json")
    assert record is not None
    assert own["about"]["protocol of the training"].endswith(f"record {record['digest']}")
    assert "LargeGate" in own["about"]["unit at encoder.ffn"]
    assert own["about"]["part of the split"] == "whole"
    assert own["gates"]["encoder.attn"]["granularity"] == "one factor per token and channel"
    page = (report / "index.html").read_text()
    assert record["digest"] in page
    assert page.count("<img") == page.count("data:image/png") == len(list(report.glob("*.png")))


def test_overlays_are_drawn_where_there_are_images(runs: Runs, report: Path, tmp_path: Path) -> None:
    names = {path.stem for path in report.glob("overlay_*.png")}
    sites = ("encoder.attn", "encoder.ffn")
    assert names == {f"overlay_{task}_{site}" for task in ("vqa", "nlvr2") for site in sites}
    (tmp_path / "few").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "few" / "other.png")
    words = [*at(runs, "large"), "--out", str(tmp_path / "out"), "--images", str(tmp_path / "few"), "--examples", "1"]
    assert run(["gates", *words]) == 0
    assert list((tmp_path / "out").glob("overlay_*")) == []
    assert "examples without an image file: 2" in (tmp_path / "out" / "index.html").read_text()


def test_a_damaged_image_is_named_and_the_others_are_drawn(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in runs.pictures.rglob("*.png"):
        own = tmp_path / "pictures" / path.relative_to(runs.pictures)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(path.read_bytes() if own.parent.name == "nlvr" else b"damaged")
    words = [*at(runs, "large"), "--out", str(tmp_path / "out"), "--images", str(tmp_path / "pictures")]
    assert run(["gates", *words]) == 0
    assert {path.name.split("_")[1] for path in (tmp_path / "out").glob("overlay_*")} == {"nlvr2"}
    assert "cannot be read: no image, or one of an unknown format" in capsys.readouterr().out


@pytest.mark.slow
def test_two_runs_are_compared(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*at(runs, "large"), "--against", str(runs.checkpoint("middle_x")), "--out", str(tmp_path / "out")]
    assert run(["gates", *words, "--split", "val", "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert "encoder.ffn: LargeGate, one factor per token and channel" in said
    assert "encoder.ffn: MiddleXGate, one factor per token\n" in said
    content = json.loads((tmp_path / "out" / "gates.json").read_text())
    assert [own["name"] for own in content["runs"]] == ["large", "middle_x"]
    assert [own["samples"] for own in content["runs"]] == [{"vqa": 2, "nlvr2": 2}] * 2
    assert content["split"] == "val"
    assert content["limit"] == 2
    assert content["runs"][0]["examples"] == content["runs"][1]["examples"]
    counts = {
        r["run"]: int(r["count"]) for r in rows_of(tmp_path / "out") if r["kind"] == "image" and r["task"] == "vqa"
    }
    assert counts == {"large": 2 * 4 * 32, "middle_x": 2 * 4}
    assert (tmp_path / "out" / "compared_vqa.svg").is_file()


def test_the_report_goes_into_the_folder_of_its_run_by_default(runs: Runs) -> None:
    assert run(["gates", *at(runs, "middle_x"), "--data.init_args.limit_eval", "1"]) == 0
    out = runs.root / "run" / "middle_x" / "gates_test"
    (own,) = json.loads((out / "gates.json").read_text())["runs"]
    assert own["about"]["part of the split"] == "the first 1 samples of each task"  # the data module's own limit
    assert own["samples"] == {"vqa": 1, "nlvr2": 1}
    assert (out / "index.html").is_file()
    assert not (out / "owner.json").exists()


@pytest.mark.parametrize(("own", "expected"), [("null", 3), ("1", 1)])
def test_the_data_module_reads_no_more_than_the_limit(runs: Runs, own: str, expected: int) -> None:
    config = runs.root / "run" / "large" / "config.yaml"
    loaded = _load(runs.checkpoint("large"), [config], ["--data.init_args.limit_eval", own], 3)
    assert loaded.data.limit_eval == expected


def test_the_batches_of_any_data_module_are_cut_to_the_limit() -> None:
    class Other:
        def setup(self, stage: str) -> None:
            self.stage = stage

        def val_dataloader(self) -> DataLoader:
            batches = [make_batch(task, 3, seed) for task in ("vqa", "gqa") for seed in range(3)]
            return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    data = Other()
    batches, total = _batches(data, "val", 4)
    assert data.stage == "validate"
    assert total == 6
    found = list(batches)
    assert [len(batch) for batch in found] == [3, 1, 0, 3, 1, 0]
    assert found[1].ids == ["vqa-1-0"]
    assert len(found[1].features) == 1


def test_the_first_samples_of_a_batch_have_all_their_parts() -> None:
    batch = make_batch("vqa", 3, 0)
    cut = first_samples(batch, 2)
    assert len(cut) == len(cut.features) == len(cut.ids) == 2
    assert cut.labels is not None
    assert len(cut.targets()) == int((cut.labels != -100).sum())
    assert first_samples(batch, 3) is batch


def test_checkpoints_of_one_run_are_named_by_their_files() -> None:
    def names(*paths: str) -> list[str]:
        first, second = (Path(path) for path in paths)
        return _names(type("Known", (), {"ckpt_path": first, "against": second})())  # type: ignore[arg-type]

    assert names("runs/a/v/checkpoints/last.ckpt", "runs/a/v/checkpoints/best.ckpt") == ["last", "best"]
    assert names("runs/a/v/checkpoints/last.ckpt", "runs/a/v/checkpoints/last.ckpt") == ["last (1)", "last (2)"]
    assert names("runs/a/v/checkpoints/last.ckpt", "runs/a/w/checkpoints/last.ckpt") == ["v", "w"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "0"], r"--limit must be 1 or more, got 0"),
        (["--examples", "0"], r"--examples must be 1 or more, got 0"),
        (["--against", "none.ckpt"], r"no checkpoint at none.ckpt \(--against\)"),
        (["--against_config", "x.yaml"], r"--against_config belongs to --against"),
        (["--images", "none"], r"--images: there is no folder none"),
        (["--config", "none.yaml"], r"no config at 'none.yaml'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    runs: Runs, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run(["gates", *at(runs, "large"), "--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", [True, False])
def test_a_method_without_gates_is_refused_before_the_data_are_read(runs: Runs, tmp_path: Path, first: bool) -> None:
    pair = ("lora", "large") if first else ("large", "lora")
    words = [*at(runs, pair[0]), "--against", str(runs.checkpoint(pair[1])), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"no gates to record: it has units LoRA; use a method with gates"):
        run(["gates", *words, "--data.init_args.root", str(tmp_path / "nothing")])
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_outside_a_run_needs_its_config(runs: Runs, tmp_path: Path) -> None:
    lone = tmp_path / "a" / "b" / "lone.ckpt"
    lone.parent.mkdir(parents=True)
    lone.write_bytes(runs.checkpoint("large").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no config.yaml at .*: --against_config FILE"):
        run(["gates", *at(runs, "large"), "--against", str(lone), "--out", str(tmp_path / "out")])
    config = str(runs.root / "run" / "large" / "config.yaml")
    words = ["--ckpt_path", str(lone), "--config", config, "--device", "cpu", "--limit", "1"]
    assert run(["gates", *words, "--out", str(tmp_path / "out")]) == 0
    assert "protocol of the training" not in (tmp_path / "out" / "index.html").read_text()
