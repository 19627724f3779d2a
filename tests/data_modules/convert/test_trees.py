"""Conversion of trees with one file per image or clip to stores."""

from __future__ import annotations

from contextlib import suppress

import h5py
import numpy as np
import pytest
import torch

from data_modules.convert.trees import convert_h5, convert_npz, read_npz
from data_modules.store.store import FeatureStore, FeatureStoreError
from tests.data_modules.convert.tiny_hub import features, write_h5
from vlpet_lightning.__main__ import run

FRAMES, WIDTH = 64, 512
LENGTHS = {"long": 150, "even": 128, "full": 64, "one_more": 65, "short": 3}


def clip(length, seed=0, kind=np.float16):
    return np.random.default_rng(seed).normal(size=(length, WIDTH)).astype(kind)


@pytest.fixture
def clips(tmp_path):
    (tmp_path / "npz").mkdir()
    found = {name: clip(length, seed) for seed, (name, length) in enumerate(LENGTHS.items())}
    for name, rows in found.items():
        np.savez(tmp_path / "npz" / f"{name}.npz", features=rows)
    return found


def expected(rows):
    """Pool or pad as ``resize`` of src/video/tvqa_data.py."""
    if len(rows) > FRAMES:
        pooled = torch.nn.AdaptiveMaxPool1d(FRAMES)(torch.from_numpy(rows).float().T[None])
        return pooled[0].T.half().numpy()
    return np.concatenate([rows, np.zeros((FRAMES - len(rows), WIDTH), np.float16)])


def test_clips_are_padded_and_pooled_as_in_the_original(tmp_path, clips):
    assert (
        run(["data", "convert", "npz", f"--source={tmp_path / 'npz'}", f"--out={tmp_path / 's'}", "--shard_rows=2"])
        == 0
    )
    store = FeatureStore(tmp_path / "s")
    names = list(clips)
    assert np.array_equal(store.gather(store.rows(names)), np.stack([expected(rows) for rows in clips.values()]))
    assert store.lengths(store.rows(names)).tolist() == list(LENGTHS.values())
    assert {name for name, _ in store.verify()} >= {"lengths.npy"}


def test_wider_floats_are_rounded_after_or_before_pooling_alike(tmp_path):
    (tmp_path / "npz").mkdir()
    rows = clip(100, kind=np.float32)
    np.savez(tmp_path / "npz" / "a.npz", features=rows)
    convert_npz(source=tmp_path / "npz", out=tmp_path / "s")
    pooled = torch.nn.AdaptiveMaxPool1d(FRAMES)(torch.from_numpy(rows).T[None])[0].T.half().numpy()
    assert np.array_equal(FeatureStore(tmp_path / "s").gather(np.arange(1))[0], pooled)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK", r"b\.npz cannot be read"),
        ({"other": clip(3)}, "no key 'features', only other"),
        ({"features": clip(3)[0]}, r"holds float16 \(512,\) instead of floats"),
        ({"features": clip(3)[:, :100]}, r"holds features of \(3, 100\) where the first file has \(3, 512\)"),
        ({"features": np.full((2, WIDTH), 1e6)}, "not finite in float16"),
    ],
)
def test_a_clip_that_cannot_be_used_is_named(tmp_path, content, message):
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "a.npz", features=clip(3))
    if isinstance(content, bytes):
        (tmp_path / "npz" / "b.npz").write_bytes(content)
    else:
        np.savez(tmp_path / "npz" / "b.npz", **content)
    with pytest.raises(FeatureStoreError, match=message):
        convert_npz(source=tmp_path / "npz", out=tmp_path / "s")


def test_a_clip_with_a_damaged_byte_is_named_or_read_as_it_was(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, features=clip(3))
    content, whole = path.read_bytes(), read_npz(path)
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with suppress(FeatureStoreError):
            assert np.array_equal(read_npz(path), whole)


def test_a_tree_goes_on_after_an_error_and_gives_the_same_bytes(tmp_path):
    names = [f"i{number}" for number in range(5)]
    write_h5(tmp_path / "tree", names, features(5))
    convert_h5(source=tmp_path / "tree", out=tmp_path / "whole", shard_rows=2)
    good = (tmp_path / "tree" / "i3.h5").read_bytes()
    (tmp_path / "tree" / "i3.h5").write_bytes(b"\0" * len(good))
    with pytest.raises(FeatureStoreError, match=r"i3\.h5 cannot be read"):
        convert_h5(source=tmp_path / "tree", out=tmp_path / "s", shard_rows=2)
    first = (tmp_path / "s" / "shard-00000.npy").stat()
    (tmp_path / "tree" / "i3.h5").write_bytes(good)
    convert_h5(source=tmp_path / "tree", out=tmp_path / "s", shard_rows=2)
    assert (tmp_path / "s" / "shard-00000.npy").stat().st_ino == first.st_ino
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == files
    assert all((tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


def test_an_image_under_another_key_is_named(tmp_path):
    write_h5(tmp_path / "tree", ["a"], features(1))
    with h5py.File(tmp_path / "tree" / "b.h5", "w") as file:
        file.create_group("c")
    with pytest.raises(FeatureStoreError, match=r"b\.h5 cannot be read \(.no data set b/features, only c.\)"):
        convert_h5(source=tmp_path / "tree", out=tmp_path / "s")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.h5 in"):
        convert_h5(source=tmp_path, out=tmp_path / "s")
