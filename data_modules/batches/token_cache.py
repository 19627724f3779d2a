"""Key of cached token tables: a split is tokenised once instead of at every start and on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "2"


def digest(tokenizer: PreTrainedTokenizerBase, settings: Iterable[object], parts: Iterable[str | bytes]) -> str:
    """Return a digest of a tokenizer with its vocabulary, of settings, and of texts or bytes in order."""
    found = hashlib.blake2b(digest_size=20)
    versions = (FORMAT, version("tokenizers"), version("transformers"))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # state left by the last call
        words.pop(state, None)
    for part in (*versions, type(tokenizer).__name__, json.dumps(words, sort_keys=True), *map(repr, settings)):
        _add(found, part)
    for content in parts:
        _add(found, content)
    return found.hexdigest()


def _add(found: hashlib.blake2b, part: str | bytes) -> None:
    content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
    found.update(len(content).to_bytes(8, "little"))
    found.update(content)
