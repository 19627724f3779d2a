"""The folder for files that can be made again: tokenised texts and fetched shards."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import gettempdir


def cache_home() -> Path:
    """Where this program keeps what it can make again: ``vlpet_lightning`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    For a user without a home it is a folder of theirs among the temporary ones.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:  # in a container, a user may have a number and nothing else
        home = Path(gettempdir()) / f"cache-of-{os.getuid()}"
    return home / "vlpet_lightning"
