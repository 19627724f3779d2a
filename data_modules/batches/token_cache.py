"""Key of cached token tables: a split is tokenised once instead of at every start and on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "2"


class TokenizerKey:
    """Part of the key that depends on the tokenizer alone; with a large vocabulary it takes a third of a second.

    Args:
        tokenizer: The tokenizer, with its vocabulary; later changes of it are not noticed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._found = hashlib.blake2b(digest_size=20)
        versions = (FORMAT, version("tokenizers"), version("transformers"))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # state left by the last call
            words.pop(state, None)
        for part in (*versions, type(tokenizer).__name__, json.dumps(words, sort_keys=True)):
            _add(self._found, part)

    def digest(self, settings: Iterable[object], parts: Iterable[str | bytes]) -> str:
        """Return a digest of the tokenizer, of settings, and of texts or bytes in order."""
        found = self._found.copy()
        for part in chain(map(repr, settings), parts):
            _add(found, part)
        return found.hexdigest()


def _add(found: hashlib.blake2b, part: str | bytes) -> None:
    content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
    found.update(len(content).to_bytes(8, "little"))
    found.update(content)
