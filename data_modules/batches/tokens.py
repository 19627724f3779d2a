"""Token ids of texts in flat arrays, tokenised once and padded per batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track

from data_modules.batches.token_cache import Arrays, TokenCache, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 10_000  # texts per tokenizer call
SHOW_PROGRESS_FROM = 100_000  # distinct texts
KEEP_FROM = 20_000  # distinct texts; fewer are tokenised in about a second


class TokenTable:
    """Token ids of texts; duplicate texts are stored once.

    Args:
        texts: ``n`` texts.
        tokenizer: A tokenizer of the transformers library.
        max_length: Maximum length including special tokens; longer sequences are truncated. None keeps all.
        title: Title of the progress bar, shown if there are many texts.
        cache: Cache for tables of many texts.
        source: All inputs from which the texts are built, if building them is slow: it serves as the cache key, and
            on a cache hit the texts are not built.
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

    @property
    def lengths(self) -> np.ndarray:
        """``(n,)`` int64 lengths of all texts in tokens."""
        return np.diff(self.offsets)[self.entry]

    def padded(self, rows: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of some texts, right-padded to the longest of them.

        Args:
            rows: ``(B,)`` numbers of texts.
            fill: Padding value.

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
