"""``data download``: requests to the Hub, and verification of the files."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from data_modules.convert import download as module
from data_modules.convert.download import download, problems
from data_modules.store.store import FeatureStoreError
from tests.data_modules.convert.tiny_hub import make_hub, part
from vlpet_lightning.__main__ import run


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def asked(published, monkeypatch):
    """Records requests to the Hub, and answers each with a copy of the published files."""
    calls = []

    def snapshot(**arguments):
        calls.append(arguments)
        shutil.copytree(published, arguments["local_dir"], dirs_exist_ok=True)

    monkeypatch.setattr(module, "snapshot", snapshot)
    return calls


def test_what_is_asked_for(asked, tmp_path, monkeypatch, capsys):
    assert run(["data", "download", f"--out={tmp_path / 'd'}", "--datasets=COCO,nlvr", "--revision=abc"]) == 0
    (call,) = asked
    assert (call["repo_id"], call["repo_type"], call["revision"]) == ("ylsung/VL-Adapter-datasets", "dataset", "abc")
    assert call["allow_patterns"] == [
        *("manifest.json.gz", "README.md", "annotations/*"),
        *("features/COCO/*", "features/nlvr/*"),
    ]
    assert "data convert hub --source" in capsys.readouterr().out


def test_an_unknown_data_set_is_refused_before_the_download(asked, tmp_path):
    with pytest.raises(ValueError, match="choose from COCO, GQA, VG, nlvr"):
        download(out=tmp_path, datasets="coco")
    assert asked == []


def test_a_download_that_stops_says_how_to_go_on(tmp_path, monkeypatch):
    def fails(**arguments):
        raise ConnectionError("timed out")

    monkeypatch.setattr(module, "snapshot", fails)
    with pytest.raises(FeatureStoreError, match=r"stopped: ConnectionError: timed out\. Give the same command again"):
        download(out=tmp_path)


def _note(root, name, sha256):
    path = root / ".cache/huggingface/download" / f"{name}.metadata"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{'0' * 40}\n{sha256}\n1.0\n")


def test_files_are_compared_with_manifest_and_hub(published, tmp_path):
    root = shutil.copytree(published, tmp_path / "d")
    for shard in range(3):
        _note(root, part("COCO", shard), hashlib.sha256((root / part("COCO", shard)).read_bytes()).hexdigest())
    assert list(problems(root, ["COCO", "nlvr"])) == []
    content = bytearray((root / part("COCO", 1)).read_bytes())
    content[1000] ^= 1
    (root / part("COCO", 1)).write_bytes(content)
    (root / part("COCO", 2)).unlink()
    (root / part("nlvr", 0)).write_bytes(content[:-9])
    (root / "annotations/vqa/karpathy_train.json").write_bytes(b'[{"sent": "b"}]')
    (root / "annotations/COCO/dataset_coco.json").write_bytes(b"{")
    found = dict(problems(root, ["COCO", "nlvr"]))
    assert "another SHA-256" in found.pop(part("COCO", 1))
    assert found.pop(part("COCO", 2)) == "is missing"
    assert "is damaged or was cut short" in found.pop(part("nlvr", 0))
    assert "CRC-32" in found.pop("annotations/vqa/karpathy_train.json")
    assert found.pop("annotations/COCO/dataset_coco.json") == "has 1 bytes, the manifest says 3"
    assert found == {}


def test_a_damaged_download_is_an_error(asked, published, tmp_path, monkeypatch):
    copied = module.snapshot

    def damaged(**arguments):
        copied(**arguments)
        (tmp_path / "manifest.json.gz").unlink()

    monkeypatch.setattr(module, "snapshot", damaged)
    with pytest.raises(FeatureStoreError, match=r"1 files are damaged or missing:\n.*manifest\.json\.gz is missing"):
        download(out=tmp_path)
