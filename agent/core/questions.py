"""The rpc lane: questions to a device that is online, answered now and never kept. docs/spec/link.md 3.5."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from agent.base.errors import AgentError, PeerError
from agent.core.outgoing import Outgoing
from agent.wire.messages import Failure, RpcAnswer, RpcRequest

_LOG = logging.getLogger("edge_agent.rpc")
#: Bytes of an answer before it is sealed; base64 and the envelope must stay within 64 KiB.
_MOST_BYTES = 44 << 10
_MOST_UNDER_WAY = 8

Answerer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Questions:
    """``quick`` are answered on the event loop, ``slow`` in a thread of asyncio's. ``seal`` signs an answer."""

    def __init__(
        self,
        outgoing: Outgoing,
        quick: Mapping[str, Answerer],
        slow: Mapping[str, Answerer],
        seal: Callable[[RpcAnswer], bytes],
        boot_nonce: str,
    ) -> None:
        self._outgoing = outgoing
        self._quick = quick
        self._slow = slow
        self._seal = seal
        self._nonce = boot_nonce
        self._under_way: set[asyncio.Task[None]] = set()

    def asked(self, request: RpcRequest) -> None:
        """Answer, at once or soon."""
        if request.op in self._quick:
            self._answer(request, lambda: self._quick[request.op](request.args))
        elif len(self._under_way) >= _MOST_UNDER_WAY:
            self._say(request, None, Failure(code="busy", text="too many questions are being answered"))
        else:
            task = asyncio.ensure_future(self._later(request))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _later(self, request: RpcRequest) -> None:
        loop = asyncio.get_running_loop()
        answerer = self._slow[request.op]
        future = loop.run_in_executor(None, answerer, request.args)
        await asyncio.wait([future])
        self._answer(request, future.result)

    def _answer(self, request: RpcRequest, result: Callable[[], Mapping[str, Any]]) -> None:
        try:
            found: Mapping[str, Any] | None = result()
            failure = None
        except PeerError as error:
            found, failure = None, Failure(code="bad_args", text=str(error), hint=error.hint)
        except AgentError as error:
            found, failure = None, Failure(code="failed", text=str(error), hint=error.hint)
        self._say(request, found, failure)

    def _say(self, request: RpcRequest, result: Mapping[str, Any] | None, failure: Failure | None) -> None:
        def answer(result: Mapping[str, Any] | None, failure: Failure | None) -> RpcAnswer:
            return RpcAnswer(
                tenant=request.tenant,
                device=request.device,
                epoch=request.epoch,
                rpc_id=request.rpc_id,
                op=request.op,
                boot_nonce=self._nonce,
                result=None if result is None else dict(result),
                error=failure,
            )

        made = answer(result, failure)
        if len(made.encode()) > _MOST_BYTES:
            made = answer(None, Failure(code="failed", text="the answer is too large for a message"))
        self._outgoing.answer(self._seal(made))


def lines_of(args: Mapping[str, Any], most: int) -> int:
    """The argument ``lines`` of ``logs.tail``. PeerError."""
    if unknown := sorted(set(args) - {"lines"}):
        raise PeerError(f"cannot take arguments: unknown '{unknown[0]}'")
    lines = args.get("lines", 100)
    if type(lines) is not int or not 1 <= lines <= most:
        raise PeerError(f"cannot take arguments: lines must be 1 to {most}")
    return lines


def without_args(answer: Callable[[], Mapping[str, Any]]) -> Answerer:
    """An answerer that takes no arguments: PeerError when there are any."""

    def answerer(args: Mapping[str, Any]) -> Mapping[str, Any]:
        if args:
            raise PeerError(f"cannot take arguments: '{min(args)}' is not known here")
        return answer()

    return answerer
