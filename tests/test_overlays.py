"""The ``overlays`` key of config files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlpet_lightning.cli import module_from_config
from vlpet_lightning.overlays import with_overlays


def write(path: Path, **content: object) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_overlays_come_before_the_file_that_names_them_and_theirs_before_them(tmp_path: Path) -> None:
    low = write(tmp_path / "low.yaml", a=1)
    middle = write(tmp_path / "middle.yaml", overlays=low)
    other = write(tmp_path / "other.yaml", b=2)
    top = write(tmp_path / "top.yaml", overlays=[middle, other])
    expected = ["--config", low, "--config", middle, "--config", other, "--config", top]
    assert with_overlays(["fit", "--config", top, "--x", "y"]) == ["fit", *expected, "--x", "y"]
    for words in ([f"--config={top}"], ["--conf", top], ["-c", top], [f"-c{top}"], [f"-c={top}"]):
        assert with_overlays(words) == expected


def test_a_method_can_be_named_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    named = write(tmp_path / "n.yaml", overlays="experiments/pet/lora.yaml", model={"init_args": {"lr": 0.5}})
    module = module_from_config(["--config", "experiments/image_text.yaml", "--config", named])
    assert "encoder.attn.query" in module.placements[0].at
    assert module.lr == 0.5


def test_what_cannot_be_laid_under_is_one_error(tmp_path: Path) -> None:
    itself = tmp_path / "itself.yaml"
    write(itself, overlays=str(itself))
    with pytest.raises(ValueError, match="is its own overlay"):
        with_overlays(["--config", str(itself)])
    with pytest.raises(FileNotFoundError, match=r"no config file nowhere\.yaml, listed in overlays of .*/a\.yaml"):
        with_overlays(["--config", write(tmp_path / "a.yaml", overlays="nowhere.yaml")])
    with pytest.raises(ValueError, match="must be the name of a config file, or a list of names, got 3"):
        with_overlays(["--config", write(tmp_path / "b.yaml", overlays=3)])
    with pytest.raises(ValueError, match="on the command line, repeat --config"):
        with_overlays(["--overlays", "experiments/pet/lora.yaml"])


def test_a_file_that_is_not_there_is_left_to_the_parser(tmp_path: Path) -> None:
    words = ["--config", str(tmp_path / "absent.yaml"), "--config"]
    assert with_overlays(words) == words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: c: d\n", r"is not valid YAML \(line 2: mapping values are not allowed here\): fix it"),
        (b"\xff\x00\x80", r"is not valid YAML \(.*\): fix it"),
        (b"\x00", r"is not valid YAML \(.*\): fix it"),
        (b"[1, 2]", r"must be a mapping of settings by name, got '\[1, 2\]'"),
        (b"", "must be a mapping of settings by name, got nothing"),
    ],
)
def test_of_several_files_the_wrong_one_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    good, wrong = write(tmp_path / "good.yaml", a=1), tmp_path / "wrong.yaml"
    wrong.write_bytes(content)
    with pytest.raises(ValueError, match=f"config file {wrong} {message}") as error:
        with_overlays(["--config", good, "--config", str(wrong), "--config", good])
    assert "\n" not in str(error.value)
