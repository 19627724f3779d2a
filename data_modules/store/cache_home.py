"""The cache folder, for files that can be regenerated: tokenised texts and fetched shards."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import gettempdir


def cache_home() -> Path:
    """Return the cache folder: ``vlpet_lightning`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    For a user without a home directory, it is a per-user folder in the system's temporary directory.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:  # in a container, a user may have a numeric id only
        home = Path(gettempdir()) / f"cache-of-{os.getuid()}"
    return home / "vlpet_lightning"
