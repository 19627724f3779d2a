"""Token ids of texts in flat arrays, tokenised once and padded per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from data_modules.annotations.columns import coded
from data_modules.batches.token_cache import TokenizerKey
from data_modules.store.array_cache import ArrayCache, Arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 10_000  # texts per tokenizer call
SHOW_PROGRESS_FROM = 100_000  # distinct texts
KEEP_FROM = 20_000  # distinct texts; fewer are tokenised in about a second


class TokenTable:
    """Token ids of texts; duplicate texts are stored once.

    Args:
        texts: ``n`` texts, or a function that builds them.
        tokenizer: A tokenizer of the transformers library.
        max_length: Maximum length including special tokens; longer sequences are truncated. None keeps all.
        title: Title of the progress bar, shown if there are many texts.
        cache: Cache for tables of many texts.
        source: All inputs from which the texts are built: they serve as the cache key, and on a cache hit the texts are
            not built. By default, the texts themselves are the key.
        tokenizer_key: Key of the tokenizer, if it is shared by several tables.
    """

    def __init__(
        self,
        texts: Iterable[str] | Callable[[], Iterable[str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        title: str = "tokenising",
        *,
        cache: ArrayCache | None = None,
        source: Iterable[str | bytes] | None = None,
        tokenizer_key: TokenizerKey | None = None,
    ) -> None:
        if cache is None:
            found = _table(texts, tokenizer, max_length, title)
        else:
            if source is None:
                texts = coded(texts() if callable(texts) else texts)
                source = texts.parts()
            key = (tokenizer_key or TokenizerKey(tokenizer)).digest((max_length,), source)
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


def _table(
    texts: Iterable[str] | Callable[[], Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    title: str,
) -> Arrays:
    column = coded(texts() if callable(texts) else texts)
    lengths, flat = _encode(column.values, tokenizer, max_length, title)
    return {"entry": column.codes, "offsets": np.concatenate([[0], np.cumsum(lengths)]), "flat": flat}


def _is_large(table: Arrays) -> bool:
    return len(table["offsets"]) > KEEP_FROM


def _encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None, title: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the int64 lengths and the concatenated int32 token ids of texts."""
    starts = range(0, len(texts), CHUNK)
    lengths, flat = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    settings: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length}
    settings |= {"return_attention_mask": False, "return_token_type_ids": False}
    for start in track(starts, description=title, disable=len(texts) < SHOW_PROGRESS_FROM, transient=True):
        ids = tokenizer(list(texts[start : start + CHUNK]), **settings)["input_ids"]
        lengths.append(np.fromiter(map(len, ids), np.int64, count=len(ids)))
        flat.append(np.fromiter(chain.from_iterable(ids), np.int32))
    return np.concatenate(lengths), np.concatenate(flat)
