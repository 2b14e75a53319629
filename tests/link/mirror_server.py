"""A mirror: a small web server over TLS that knows ranges, and can be told to misbehave.

``files`` are its files by path. ``scripts`` are done in place of an answer, one for each request, as long as there are
any; ``always`` for each. Each gets the request and may write what it likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from tests.link.certificates import Authority

_PIECE = 64 << 10


class Exchange(BaseHTTPRequestHandler):
    """One request. ``mirror`` is where it came to."""

    protocol_version = "HTTP/1.1"
    mirror: Mirror

    def setup(self) -> None:
        if self.mirror.context is not None:
            self.request = self.mirror.context.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    def do_GET(self) -> None:
        self.mirror.ports.append(self.client_address[1])
        self.mirror.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        scripts = self.mirror.scripts
        script = scripts.pop(0) if scripts else self.mirror.always
        with contextlib.suppress(OSError):
            script(self)

    def log_message(self, *_: object) -> None:
        pass

    # -- what scripts use ---------------------------------------------------------------------------------------------

    @property
    def data(self) -> bytes:
        return self.mirror.files[self.path.lstrip("/")]

    def head(self, status: int, **fields: object) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.close_connection = True

    def body(self, data: bytes, begin: int = 0) -> None:
        for at in range(begin, len(data), _PIECE):
            self.wfile.write(data[at : at + _PIECE])
            self.mirror.sent += len(data[at : at + _PIECE])

    def first(self) -> int:
        """Where the asked range begins."""
        text = self.headers.get("Range", "bytes=0-")
        return int(text.removeprefix("bytes=").rstrip("-"))

    def serve(self) -> None:
        """As a good mirror does."""
        data = self.mirror.files.get(self.path.lstrip("/"))
        if data is None:
            self.head(404, Content_Length=0)
            return
        tag = f'"{hashlib.sha256(data[:4096]).hexdigest()[:16]}-{len(data)}"'
        begin, whole = self.first(), "Range" not in self.headers
        if not whole and self.headers.get("If-Range", tag) != tag:
            begin, whole = 0, True
        if whole:
            self.head(200, Content_Length=len(data), ETag=tag)
        else:
            place = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            self.head(206, Content_Length=len(data) - begin, Content_Range=place, ETag=tag)
        self.body(data, begin)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that breaks off, or does not trust us, is what tests are about."""


class Mirror:
    """``with Mirror(files, folder) as mirror: mirror.base``. Without a folder for its certificate it speaks http."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        folder: Path | None = None,
        host: str = "localhost",
        authority: Authority | None = None,
    ) -> None:
        self.files = dict(files)
        self.scripts: list[Callable[[Exchange], None]] = []
        self.always: Callable[[Exchange], None] = Exchange.serve
        self.asked: list[tuple[str, dict[str, str]]] = []
        #: From which port each request came.
        self.ports: list[int] = []
        self.sent = 0
        self.context: ssl.SSLContext | None = None
        self.ca = ""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            authority = authority or Authority("mirror CA")
            (folder / "ca.pem").write_bytes(authority.pem)
            self.ca = str(folder / "ca.pem")
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(*authority.issue(folder, "mirror", host, host=host))
        handler = type("Handler", (Exchange,), {"mirror": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port = int(self._server.server_address[1])
        self.base = f"{'https' if self.context else 'http'}://localhost:{self.port}"

    def __enter__(self) -> Mirror:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def ranges(self) -> list[str]:
        """The Range field of each request, "" without."""
        return [fields.get("range", "") for _, fields in self.asked]
