"""Lengths before truncation equal the tokenizer's, and histograms are split at the limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_modules.annotations.image_text import read_split
from data_modules.batches.prompts import input_texts
from data_modules.check.lengths import BARS, COLUMNS, Lengths, lost_by_cutting, token_lengths
from tests.data_modules.tiny_data import write_tokenizer
from tests.data_modules.tiny_video import write_video_world
from vlpet_lightning.backbones import load_tokenizer
from vlpet_lightning.tasks import TASKS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    write_video_world(root)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def tokenizer(root):
    return load_tokenizer(str(root / "tokenizer"))


def test_lengths_are_those_of_the_tokenizer_even_after_it_has_cut(tokenizer):
    texts = ["red", "a longer text, whose words are unknown <mask>", "red", "", "thing " * 50]
    uncut = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    tokenizer(texts, truncation=True, max_length=3, padding=True)  # the tokenizer keeps this setting
    told = []
    lengths = token_lengths(texts, tokenizer, lambda done, total: told.append((done, total)))
    assert lengths.tolist() == uncut
    assert told == [(4, 4)]  # duplicates are counted once


def bars(tokens, limit):
    return Lengths("vqa", "train", "input", np.asarray(tokens), limit)


def test_a_histogram_parts_at_the_limit():
    one = bars([3, 4, 4, 4, 4, 6, 7, 9], 6)
    assert one.cut == 2
    assert one.bars == (f"{BARS[1]}{BARS[7]} {BARS[1]}", f"{BARS[1]} {BARS[1]}")


@pytest.mark.parametrize(
    ("tokens", "limit"),
    [
        (range(3, 1000), 600),
        (range(3, 1000), None),
        (range(3, 1000), 10),
        (range(20, 30), 10),
        ([5, 6, 100_000], 20),
        ([7], 7),
        ([7], 3),
        (range(590, 700), 600),
    ],
)
def test_every_length_is_in_a_histogram_on_its_side_of_the_limit(tokens, limit):
    one = bars(list(tokens), limit)
    counts, kept = one._histogram()
    assert counts.sum() == len(one.tokens)
    assert counts[kept:].sum() == one.cut
    assert len(counts) <= COLUMNS + 1
    assert one.bars[0].strip() or not counts[:kept].any()


@pytest.mark.parametrize("task", ["tvqa", "yc2c"])
def test_what_a_cut_takes_away_is_what_is_not_in_the_tokens_that_are_kept(root, tokenizer, task):
    prompt = TASKS[task].prompt
    samples = read_split(root, TASKS[task], "train")
    seen = set()
    for limit in range(4, 60):
        spec = replace(TASKS[task], max_text=limit)
        texts = list(input_texts(spec, samples, prompt))
        kept = [tokenizer.decode(ids[1:-1]) for ids in tokenizer(texts, truncation=True, max_length=limit)["input_ids"]]
        all_rows = np.ones(len(texts), dtype=bool)
        lost = lost_by_cutting(spec, samples, prompt, tokenizer, all_rows)
        assert lost.prompt == sum(
            len(text.rstrip()) <= len(full) - len(prompt) for text, full in zip(kept, texts, strict=True)
        )
        asked = [full.index("[Q]") if task == "tvqa" else None for full in texts]
        assert lost.text == sum(
            at is not None and len(text.rstrip()) <= at for text, at in zip(kept, asked, strict=True)
        )
        seen.add((lost.prompt > 0, lost.text > 0))
    assert (True, task == "tvqa") in seen


def test_only_the_inputs_that_are_cut_are_looked_at(root, tokenizer):
    samples = read_split(root, TASKS["tvqa"], "train")
    spec = replace(TASKS["tvqa"], max_text=8)
    cut = np.array([True, False, False, True, False, False])
    lost = lost_by_cutting(spec, samples, spec.prompt, tokenizer, cut)
    assert lost.prompt == 2
    assert lost_by_cutting(spec, samples, "", tokenizer, cut).prompt == 0  # without a prompt, none is lost
