"""Local web server for a folder, with configurable failures."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HANG = 10.0  # maximum seconds that a hanging request is held


@dataclass
class Site:
    """A served folder.

    Args:
        root: The folder.
        listing: Whether directories can be listed.
    """

    root: Path
    listing: bool = True
    faults: list[list] = field(default_factory=list)
    gets: Counter[str] = field(default_factory=Counter)
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, pattern: str, *kinds: str, times: int = 1) -> None:
        """Let the next requests for matching paths fail.

        Args:
            pattern: Regular expression for the paths.
            kinds: ``hang``, ``reset``, ``cut``, ``short``, ``wrong`` or a status.
            times: Number of requests for each kind.
        """
        self.faults += [[re.compile(pattern), kind] for kind in kinds for _ in range(times)]

    def fault(self, path: str) -> str | None:
        """Return the failure of a request."""
        with self.lock:
            self.gets[path] += 1
            for number, (pattern, kind) in enumerate(self.faults):
                if pattern.search(path):
                    del self.faults[number]
                    return kind
        return None

    def fetched(self, pattern: str = "shard-|parquet") -> dict[str, int]:
        """Return the number of requests for files."""
        return {Path(path).name: count for path, count in self.gets.items() if re.search(pattern, path)}


class Handler(SimpleHTTPRequestHandler):
    """Serves files and single ranges."""

    site: Site

    def do_GET(self) -> None:
        kind = self.site.fault(self.path)
        path = Path(self.translate_path(self.path))
        if kind is None and path.is_file() and "Range" in self.headers:
            return self._send_range(path)
        if kind is None or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        if kind.isdigit():
            return self.send_error(int(kind))
        if kind == "wrong":
            content = bytes(len(content))
        half = content[: len(content) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(half if kind == "short" else content)))
        self.end_headers()
        self.wfile.write(content if kind == "wrong" else half)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if kind == "hang":
            self.site.over.wait(HANG)
        self.close_connection = True

    def _send_range(self, path: Path) -> None:
        content = path.read_bytes()
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()  # type: ignore[union-attr]
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def list_directory(self, path):  # type: ignore[no-untyped-def]
        if self.site.listing:
            return super().list_directory(path)
        return self.send_error(403)

    def handle(self) -> None:
        with suppress(OSError):  # from a connection that was reset or closed by its client
            super().handle()

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@contextmanager
def serve(root: Path, *, listing: bool = True) -> Iterator[Site]:
    """Serve a folder while the block runs."""
    site = Site(root, listing)

    class Here(Handler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(root))  # type: ignore[arg-type]

    Here.site = site
    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
