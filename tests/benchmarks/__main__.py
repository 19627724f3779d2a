"""Benchmarks by name: ``python -m tests.benchmarks NAME [options]``; each has its own ``--help``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

NAMES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        wanted = sys.argv[1] if len(sys.argv) > 1 else ""
        sys.exit(f"no benchmark {wanted!r}: choose from {', '.join(NAMES)}")
    name = sys.argv.pop(1)
    sys.argv[0] = f"python -m tests.benchmarks {name}"
    runpy.run_module(f"tests.benchmarks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
