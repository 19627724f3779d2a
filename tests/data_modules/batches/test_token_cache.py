"""Token cache: tokenised once, keyed by everything that tokens depend on, and refused if damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_modules.batches import tokens
from data_modules.batches.token_cache import TokenizerKey
from data_modules.batches.tokens import TokenTable
from data_modules.image_text import ImageTextDataModule
from data_modules.store.array_cache import ArrayCache
from data_modules.store.cache_home import cache_home
from tests.data_modules.tiny_data import write_tokenizer, write_world

TEXTS = ["vqa: what color is it", "vqa: how many", "vqa: how many", "caption: "]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArrayCache:
    monkeypatch.setattr(tokens, "KEEP_FROM", 1)
    return ArrayCache(tmp_path / "cache")


def digest(tokenizer: PreTrainedTokenizerBase, *parts: Any) -> str:
    return TokenizerKey(tokenizer).digest(*parts)


def same(one: TokenTable, two: TokenTable) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("entry", "offsets", "flat"))


def never(*_: object) -> None:
    raise AssertionError("tokenised again")


def test_a_second_start_does_not_tokenise(
    tokenizer: PreTrainedTokenizerBase, cache: ArrayCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TokenTable(iter(TEXTS), tokenizer, 20, cache=cache)
    assert same(first, TokenTable(TEXTS, tokenizer, 20))
    monkeypatch.setattr(tokens, "_encode", never)
    assert same(first, TokenTable(iter(TEXTS), tokenizer, 20, cache=cache))


def test_the_key_is_the_tokenizer_the_limit_and_every_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["<vis_extra_id_0>"])
    keys = [
        digest(tokenizer, (20,), TEXTS),
        digest(other, (20,), TEXTS),
        digest(tokenizer, (21,), TEXTS),
        digest(tokenizer, (None,), TEXTS),
        digest(tokenizer, (20,), TEXTS[::-1]),
        digest(tokenizer, (20,), TEXTS[:-1]),
        digest(tokenizer, (20,), ["vqa: what color is i", "tvqa: how many", *TEXTS[2:]]),  # moved to the next text
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_depend_on_what_the_tokenizer_did_before(tokenizer: PreTrainedTokenizerBase) -> None:
    before = digest(tokenizer, (20,), TEXTS)
    tokenizer(TEXTS, truncation=True, max_length=3, padding=True)
    assert digest(tokenizer, (20,), TEXTS) == before


def test_a_shared_key_gives_the_same_digests(tokenizer: PreTrainedTokenizerBase) -> None:
    shared = TokenizerKey(tokenizer)
    for settings in ((20,), (None,)):
        assert shared.digest(settings, TEXTS) == digest(tokenizer, settings, TEXTS)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another archive"])
def test_a_damaged_file_is_made_again(tokenizer: PreTrainedTokenizerBase, cache: ArrayCache, damage: str) -> None:
    whole = TokenTable(TEXTS, tokenizer, 20, cache=cache)
    (path,) = cache.folder.glob("*.npz")
    content = bytearray(path.read_bytes())
    if damage == "another archive":
        np.savez(path, other=np.zeros(3))
    else:
        place = content.index(whole.flat.tobytes())
        content[place] ^= 1
        path.write_bytes({"cut": content[:-30], "flipped": content, "empty": b""}[damage])
    assert same(TokenTable(TEXTS, tokenizer, 20, cache=cache), whole)
    assert same(TokenTable(TEXTS, tokenizer, 20, cache=cache), whole)


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    tokenizer: PreTrainedTokenizerBase, cache: ArrayCache
) -> None:
    cache.folder.write_text("a file is in the way")
    assert same(TokenTable(TEXTS, tokenizer, 20, cache=cache), TokenTable(TEXTS, tokenizer, 20))


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_home().parent.name == f"cache-of-{os.getuid()}"


def test_few_texts_are_not_kept(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    TokenTable(TEXTS, tokenizer, 20, cache=ArrayCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_the_files_used_longest_ago_make_room(tokenizer: PreTrainedTokenizerBase, cache: ArrayCache) -> None:
    TokenTable(TEXTS, tokenizer, 10, cache=cache)
    (path,) = cache.folder.glob("*.npz")
    cache.kept_bytes = 5 * path.stat().st_size // 2
    os.utime(path, (time.time() - 100,) * 2)
    TokenTable(TEXTS, tokenizer, 11, cache=cache)
    second = {file for file in cache.folder.glob("*.npz") if file != path}
    os.utime(second.copy().pop(), (time.time() - 50,) * 2)
    TokenTable(TEXTS, tokenizer, 10, cache=cache)  # most recently used
    TokenTable(TEXTS, tokenizer, 12, cache=cache)
    left = set(cache.folder.glob("*.npz"))
    assert path in left
    assert len(left) == 2
    assert not second & left


def test_a_damaged_byte_never_stops_a_run(tokenizer: PreTrainedTokenizerBase, cache: ArrayCache) -> None:
    key, names = "k", {"entry", "offsets", "flat"}
    made = {name: np.arange(3) for name in names}
    cache.get(key, names, lambda: made, lambda arrays: True)
    path = cache.folder / f"{key}.npz"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        found = cache.get(key, names, lambda: made, lambda arrays: False)
        assert all(np.array_equal(found[name], made[name]) for name in names)


def test_what_a_killed_process_left_is_removed(tokenizer: PreTrainedTokenizerBase, cache: ArrayCache) -> None:
    cache.folder.mkdir()
    old, new = cache.folder / "a.1.part", cache.folder / "b.2.part"
    old.write_text("")
    new.write_text("")
    os.utime(old, (time.time() - 200_000,) * 2)
    TokenTable(TEXTS, tokenizer, 10, cache=cache)
    assert not old.exists()
    assert new.exists()


def test_a_data_module_gives_the_same_batches_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tokens, "KEEP_FROM", 1)
    root = tmp_path / "root"
    write_world(root)
    write_tokenizer(root / "tokenizer")

    def batches(cached: bool) -> list[tuple[list[int], list[int]]]:
        module = ImageTextDataModule(
            str(root), f"{root}/tokenizer", ["vqa", "nlvr2"], batch_size=3, eval_batch_size=3, token_cache=cached
        )
        module.setup("fit")
        return [(batch.input_ids.tolist(), batch.labels.tolist()) for batch in module.train_dataloader()]

    plain = batches(False)
    assert not (tmp_path / "home").exists()
    assert batches(True) == plain
    assert list((tmp_path / "home/vlpet_lightning/tokens").glob("*.npz"))
    monkeypatch.setattr(tokens, "_encode", never)
    assert batches(True) == plain


def test_a_data_module_reads_the_vocabulary_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_world(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    read, made = TokenizerKey.__init__, []

    def counted(self: TokenizerKey, tokenizer: PreTrainedTokenizerBase) -> None:
        made.append(tokenizer)
        read(self, tokenizer)

    monkeypatch.setattr(TokenizerKey, "__init__", counted)
    ImageTextDataModule(str(tmp_path), f"{tmp_path}/tokenizer", ["vqa", "nlvr2"]).setup("fit")
    assert len(made) == 1
