"""Optional dependencies of the data commands."""

from __future__ import annotations


def need(module: str) -> None:
    """Check that a package of the extra ``data`` is installed.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{module} is not installed: pip install 'vlpet-lightning[data]'") from error
