"""Texts as token ids in flat arrays, tokenised once and padded a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track

from data_modules.batches.token_cache import Arrays, TokenCache, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 10_000  # texts a call of the tokenizer
SHOW_PROGRESS_FROM = 100_000  # distinct texts
KEEP_FROM = 20_000  # distinct texts; fewer take about a second


class TokenTable:
    """Token ids of texts; equal texts are stored once.

    Args:
        texts: ``n`` texts.
        tokenizer: A tokenizer of the transformers library.
        max_length: Longest sequence with special tokens; longer ones are cut. None keeps all.
        title: What a progress bar says while many texts are tokenised.
        cache: Where tables of many texts are kept.
        source: All that the texts are made from, if making them is slow: kept tables are found by it, and the texts are
            then not looked at.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        title: str = "tokenising",
        *,
        cache: TokenCache | None = None,
        source: Iterable[str] | None = None,
    ) -> None:
        if cache is None:
            found = _table(texts, tokenizer, max_length, title)
        else:
            texts = list(texts) if source is None else texts
            key = digest(tokenizer, (max_length,), texts if source is None else source)
            make = partial(_table, texts, tokenizer, max_length, title)
            found = cache.get(key, {"entry", "offsets", "flat"}, make, _is_large)
        self.entry, self.offsets, self.flat = found["entry"], found["offsets"], found["flat"]

    def __len__(self) -> int:
        return len(self.entry)

    def padded(self, rows: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of some texts, right-padded to the longest of them.

        Args:
            rows: ``(B,)`` numbers of texts.
            fill: What padding holds.

        Returns:
            ``(B, T)`` int64 ids and the ``(B, T)`` bool mask, true on real tokens.
        """
        entries = self.entry[rows]
        starts = self.offsets[entries]
        lengths = self.offsets[entries + 1] - starts
        columns = np.arange(lengths.max(initial=1))
        mask = columns < lengths[:, None]
        positions = np.where(mask, starts[:, None] + columns, 0)
        return np.where(mask, self.flat[positions], fill).astype(np.int64), mask


def _table(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None, title: str) -> Arrays:
    index: dict[str, int] = {}
    entry = np.fromiter((index.setdefault(text, len(index)) for text in texts), dtype=np.int32)
    encoded = _encode(list(index), tokenizer, max_length, title)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.fromiter((id for ids in encoded for id in ids), dtype=np.int32, count=int(offsets[-1]))
    return {"entry": entry, "offsets": offsets, "flat": flat}


def _is_large(table: Arrays) -> bool:
    return len(table["offsets"]) > KEEP_FROM


def _encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None, title: str
) -> list[list[int]]:
    starts = range(0, len(texts), CHUNK)
    encoded: list[list[int]] = []
    for start in track(starts, description=title, disable=len(texts) < SHOW_PROGRESS_FROM, transient=True):
        chunk = list(texts[start : start + CHUNK])
        encoded.extend(tokenizer(chunk, truncation=max_length is not None, max_length=max_length)["input_ids"])
    return encoded
