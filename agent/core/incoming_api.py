"""What core wants, told to link, and the bytes that it brings: docs/spec/link.md 6. Rows with the right ``carry``.

Link is told paths, lengths and the configured mirrors; it brings bytes or a word why there are none. What they are is
judged by whoever wanted them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from agent.base.config import DeliveryConfig
from agent.base.errors import PeerError
from agent.core.link_api import MOST_WAIT_S, wait_of
from agent.serve.access import CARRY
from agent.serve.exchange import Request, Response, json_response
from agent.serve.limits import MIB
from agent.serve.routes import Route
from agent.trust.desk import Desk
from agent.trust.landing import OffsetError
from agent.trust.wants import WORDS, DeliveryError, Want

_MOST_BODY = MIB
_MOST_TEXT = 500
#: A slow card takes its time to flush; the bytes are safe meanwhile, and whoever brings them waits for it.
_FLUSH_S = 180.0


class IncomingApi:
    """Handlers of the rows. ``delivery`` gives the configuration as it is now. For the event loop's thread."""

    def __init__(self, desk: Desk, delivery: Callable[[], DeliveryConfig]) -> None:
        self._desk = desk
        self._delivery = delivery
        self._news = asyncio.Event()
        self._stopped = False
        self._said: dict[str, Any] = {}
        # Whoever asks with the number of an earlier start must not be kept waiting.
        self._version = secrets.randbelow(1 << 48)

    def start(self) -> None:
        """From now on whoever waits hears of new wants."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self.wake)

        self._desk.watch(tell)

    def stop(self) -> None:
        """Nobody waits any more, neither for bytes nor for wants."""
        self._desk.watch(lambda: None)
        self._desk.stop()
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """The wants, or the configuration, may be others."""
        self._news.set()
        self._news = asyncio.Event()

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("GET", "/v1/link/wants", CARRY, self._wants, deadline_s=MOST_WAIT_S + 15),
            Route("PUT", "/v1/incoming/{id}", CARRY, self._put, body_bytes=_MOST_BODY, deadline_s=_FLUSH_S),
            Route("POST", "/v1/incoming/{id}/failed", CARRY, self._failed, body_bytes=4096),
        ]

    async def _wants(self, request: Request) -> Response:
        options = request.options()
        known, end = options.get("known", ""), time.monotonic() + wait_of(options)
        while True:
            news, document = self._news, self._document()
            left_s = end - time.monotonic()
            if self._stopped or left_s <= 0 or str(document["version"]) != known:
                return json_response(document)
            try:
                await asyncio.wait_for(news.wait(), left_s)
            except asyncio.TimeoutError:  # on Python 3.10 a class of its own
                continue

    def _document(self) -> dict[str, Any]:
        wants, config = self._desk.open_wants(), self._delivery()
        rows = [_described(want) for want in wants]
        said: dict[str, Any] = {
            "mirrors": list(config.mirrors),
            "ca_file": config.ca_file,
            "rate_kib_s": config.rate_kib_s,
            "blocks": config.blocks,
            "doubts": self._desk.doubts,
            "wants": rows,
        }
        if said != self._said:  # how far a want has come is no news
            self._said = said
            self._version += 1
        here = [{**row, "offset": want.offset} for row, want in zip(rows, wants, strict=True)]
        return {"version": self._version, **said, "wants": here}

    async def _put(self, request: Request) -> Response:
        options = request.options()
        pieces = [request.body] if request.body else []
        put = partial(self._desk.put, request.params["id"], _offset(options), pieces, last=options.get("end") == "1")
        try:
            taken = await asyncio.get_running_loop().run_in_executor(None, put)
        except OffsetError as error:
            return json_response({"error": str(error), "offset": error.offset}, 409)
        except DeliveryError as error:
            return json_response({"error": str(error), "code": error.code}, 403)
        return json_response({"offset": taken.offset, "done": taken.done})

    def _failed(self, request: Request) -> Response:
        document = request.json()
        text = document.get("text")
        code = next((word for word in WORDS if word == document.get("code")), None)
        if code is None:
            raise PeerError(f"cannot read request: 'code' must be one of {', '.join(WORDS)}")
        if not isinstance(text, str):
            raise PeerError("cannot read request: 'text' must be a text")
        self._desk.fail(request.params["id"], code, text[:_MOST_TEXT])
        return json_response({})


def _described(want: Want) -> dict[str, Any]:
    return {
        "id": want.id,
        "path": want.path,
        "most": want.most,
        "within_s": want.within_s,
        "length": want.length,
        "sha256": want.sha256,
    }


def _offset(options: Mapping[str, str]) -> int:
    text = options.get("offset", "")
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise PeerError("cannot read request: 'offset' must be a number of bytes")
    return int(text)
