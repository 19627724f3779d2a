"""8-bit and compressed rows: errors, lossless encodings, and damage."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data_modules.store.encodings import encoding
from data_modules.store.recode import recode
from data_modules.store.resumable import Part, ResumableStore, Rows, fill
from data_modules.store.store import META, FeatureStore, FeatureStoreError
from data_modules.store.writer import FeatureWriter

ROWS, TOKENS, DIM = 23, 4, 32


def features(*, signed: bool = False) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 3, (ROWS, TOKENS, DIM))
    return (values if signed else np.maximum(values, 0)).astype(np.float16)


def store(path: Path, values: np.ndarray, shards: int = 3) -> Path:
    with FeatureWriter(path, tokens=TOKENS, dim=DIM, shard_bytes=values[0].nbytes * -(-ROWS // shards)) as writer:
        writer.add([f"i{number}" for number in range(len(values))], values)
    return path


@pytest.mark.parametrize("rows", ["float16", "zstd", "lz4"])
@pytest.mark.parametrize("shards", [1, 3])
def test_compressed_rows_are_the_same_bits(tmp_path: Path, rows: str, shards: int) -> None:
    values = features(signed=True)
    recode(source=store(tmp_path / "s", values, shards), out=tmp_path / "t", rows=rows)
    opened = FeatureStore(tmp_path / "t")
    wanted = np.array([22, 0, 5, 5, 13, 8])
    assert opened.gather(wanted).tobytes() == values[wanted].tobytes()
    assert opened.ids == FeatureStore(tmp_path / "s").ids
    assert opened.gather(np.array([], dtype=np.int64)).shape == (0, TOKENS, DIM)


@pytest.mark.parametrize("signed", [False, True])
def test_eight_bits_err_by_half_a_step_of_their_vector_at_most(tmp_path: Path, signed: bool) -> None:
    values = features(signed=signed)
    recode(source=store(tmp_path / "s", values), out=tmp_path / "t", rows="uint8")
    found = FeatureStore(tmp_path / "t").gather(np.arange(ROWS)).astype(np.float64)
    wanted = values.astype(np.float64)
    step = (wanted.max(axis=2, keepdims=True) - wanted.min(axis=2, keepdims=True)) / 255
    rounding = np.abs(wanted).max() * 2.0**-11
    assert (np.abs(found - wanted) <= step / 2 + rounding).all()
    assert np.abs(found - wanted).max() > 0
    assert (
        found[wanted == wanted.min(axis=2, keepdims=True)] == wanted[wanted == wanted.min(axis=2, keepdims=True)]
    ).all()


def test_eight_bits_take_half_the_room_and_keep_equal_vectors(tmp_path: Path) -> None:
    values = np.full((ROWS, TOKENS, DIM), 3.5, dtype=np.float16)
    recode(source=store(tmp_path / "s", values), out=tmp_path / "t", rows="uint8")
    opened = FeatureStore(tmp_path / "t")
    assert (opened.gather(np.arange(ROWS)) == 3.5).all()
    sizes = [sum(entry["bytes"] for entry in FeatureStore(tmp_path / name).meta["shards"]) for name in "st"]
    assert sizes[1] < 0.75 * sizes[0]  # 8 bytes per vector are negligible at a width of 512, but not at 32


@pytest.mark.parametrize("rows", ["uint8", "zstd"])
def test_a_recoded_store_can_be_handed_to_another_process(tmp_path: Path, rows: str) -> None:
    recode(source=store(tmp_path / "s", features()), out=tmp_path / "t", rows=rows)
    opened = FeatureStore(tmp_path / "t")
    before = opened.gather(np.arange(ROWS))
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).gather(np.arange(ROWS)), before)


def test_stored_rows_decode_the_same_in_any_batch(tmp_path: Path) -> None:
    recode(source=store(tmp_path / "s", features()), out=tmp_path / "t", rows="uint8")
    opened = FeatureStore(tmp_path / "t")
    stored = torch.from_numpy(opened.stored(np.arange(ROWS)))
    assert opened.gather(np.array([], dtype=np.int64)).shape == (0, TOKENS, DIM)
    one = torch.cat([opened.encoding.decoded(stored[row : row + 1]) for row in range(ROWS)])
    assert torch.equal(one, opened.encoding.decoded(stored))


def test_recoding_goes_on_and_keeps_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = np.arange(ROWS, dtype=np.int32)
    rows = Rows([f"c{number}" for number in range(ROWS)], features(), lengths)
    parts = [Part("all", 1, ROWS, lambda: iter([rows]))]
    fill([ResumableStore(tmp_path / "s", parts, tokens=TOKENS, dim=DIM, extractor={"model": "m"})], workers=1)
    recode(source=tmp_path / "s", out=tmp_path / "t", rows="lz4")
    opened = FeatureStore(tmp_path / "t")
    assert np.array_equal(opened.lengths(opened.rows(rows.ids)), lengths)
    assert opened.meta["extractor"] == {"model": "m"}
    recode(source=tmp_path / "s", out=tmp_path / "t", rows="lz4")
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(FeatureStoreError, match="choose another --out"):
        recode(source=tmp_path / "s", out=tmp_path / "t", rows="uint8")


def test_a_store_is_not_recoded_onto_itself(tmp_path: Path) -> None:
    store(tmp_path / "s", features())
    with pytest.raises(FeatureStoreError, match="are both"):
        recode(source=tmp_path / "s", out=tmp_path / "x/../s", rows="uint8")


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    store(tmp_path / "s", features())
    with pytest.raises(ValueError, match="choose from float16, uint8, zstd, lz4"):
        recode(source=tmp_path / "s", out=tmp_path / "t", rows="int4")
    assert not (tmp_path / "t").exists()
    meta = json.loads((tmp_path / "s" / META).read_text())
    (tmp_path / "s" / META).write_text(json.dumps({**meta, "encoding": "int4"}))
    with pytest.raises(FeatureStoreError, match=r"unknown row encoding .int4..*update this program"):
        FeatureStore(tmp_path / "s")


@pytest.mark.parametrize("rows", ["uint8", "zstd"])
def test_damage_in_a_recoded_shard_is_named(tmp_path: Path, rows: str) -> None:
    recode(source=store(tmp_path / "s", features()), out=tmp_path / "t", rows=rows)
    shard = tmp_path / "t" / f"shard-00001{encoding(rows).suffix}"
    content = bytearray(shard.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    shard.write_bytes(content)
    with pytest.raises(FeatureStoreError, match=f"{shard.name} is damaged"):
        FeatureStore(tmp_path / "t").gather(np.arange(ROWS))


def test_a_store_that_was_rounded_says_so_for_good(tmp_path: Path) -> None:
    recode(source=store(tmp_path / "s", features()), out=tmp_path / "t", rows="uint8")
    recode(source=tmp_path / "t", out=tmp_path / "u", rows="float16")
    recode(source=tmp_path / "u", out=tmp_path / "v", rows="lz4")
    said = [FeatureStore(tmp_path / name).meta["extractor"].get("rounded to") for name in "stuv"]
    assert said == [None, None, "uint8", "uint8"]


@pytest.mark.parametrize("name", ["shard-00001.npy", "ids.npy"])
def test_a_store_with_damaged_bytes_is_not_recoded(tmp_path: Path, name: str) -> None:
    damaged = store(tmp_path / "s", features()) / name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(FeatureStoreError, match=f"{name} was changed since it was written"):
        recode(source=tmp_path / "s", out=tmp_path / "t", rows="zstd")
    assert not (tmp_path / "t" / META).exists()
    assert not (tmp_path / "t" / "shard-00001.rows").exists()
