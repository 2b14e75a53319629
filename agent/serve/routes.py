"""The route table: method, path pattern, right and handler in one row each, and the match of a request against it.

Unknown path 404, known path with another method 405, method unknown to HTTP 501; a peer without any right on the socket
gets 403 for everything, so that it does not learn the paths.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from agent.base.errors import NotFoundError, RefusedError
from agent.serve.access import Peer
from agent.serve.exchange import Request, Response
from agent.serve.heads import ProtocolError

Handler = Callable[[Request], "Response | Awaitable[Response]"]

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"))
_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Route:
    """One row. ``{name}`` in ``pattern`` stands for one path segment.

    ``admit(peer, params)`` may refuse as soon as the head is there, before a body is taken. ``needs_body``: a request
    without a length gets 411. ``body_bytes`` and ``deadline_s`` replace the socket's limits for this row.
    """

    method: str
    pattern: str
    right: str
    handler: Handler
    admit: Callable[[Peer, Mapping[str, str]], None] | None = None
    needs_body: bool = False
    body_bytes: int | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A row with the parameters of one target."""

    route: Route
    path: str
    query: str
    params: Mapping[str, str]


class RouteTable:
    """Rows by path. Rows with literal segments win over rows with parameters at the same place."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._tree: dict[str, Any] = {}
        self._matched: dict[tuple[str, str], Match] = {}
        for route in self.routes:
            self._insert(route)

    def _insert(self, route: Route) -> None:
        node = self._tree
        for segment in _segments(route.pattern):
            node = node.setdefault("{}" if segment.startswith("{") else segment, {})
        methods = node.setdefault("", {})  # "" is no segment: empty ones never match
        if route.method in methods:
            raise ValueError(f"two routes for {route.method} {route.pattern}")
        methods[route.method] = route

    def match(self, method: str, target: str) -> Match:
        """The row for a request target. Raises ProtocolError 400, 405 or 501, and NotFoundError."""
        match = self._matched.get((method, target))
        if match is not None:
            return match
        path, _, query = _origin_form(target).partition("?")
        segments = [_decode(segment) for segment in _segments(path)]
        methods = _descend(self._tree, segments, 0)
        if method not in _METHODS:
            raise ProtocolError(501, f"cannot serve {method}: unknown method")
        if methods is None:
            raise NotFoundError(f"cannot serve {path[:200]}: no such path")
        route = methods.get(method) or (methods.get("GET") if method == "HEAD" else None)
        if route is None:
            names = sorted({*methods, "HEAD"} if "GET" in methods else methods)
            raise ProtocolError(
                405,
                f"cannot serve {method} on {path[:200]}: method not allowed",
                headers=(("Allow", ", ".join(names)),),
            )
        match = Match(route, path, query, _params(route.pattern, segments))
        if len(self._matched) >= _REMEMBERED:
            self._matched.clear()
        self._matched[method, target] = match
        return match


def require(route: Route, rights: frozenset[str]) -> None:
    """Raise RefusedError unless the peer has the row's right."""
    if route.right not in rights:
        raise RefusedError(f"cannot serve {route.pattern}: this user lacks the right '{route.right}'")


def _segments(path: str) -> list[str]:
    return path.split("/")[1:]


def _origin_form(target: str) -> str:
    """The path of a target; the absolute form is accepted as RFC 9112 3.2.2 demands."""
    if target[:7].lower() == "http://":
        _, slash, rest = target[7:].partition("/")
        target = slash + rest
    if not target.startswith("/"):
        raise ProtocolError(400, "cannot read request: the target must be a path")
    return target


def _decode(segment: str) -> str:
    """One segment with its %XX resolved. A decoded slash stays inside its segment, so it cannot make another path."""
    if "%" not in segment:
        return segment
    for index, char in enumerate(segment):
        if char == "%":
            digits = segment[index + 1 : index + 3]
            if len(digits) != 2 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                raise ProtocolError(400, "cannot read request: malformed % in the path")
    try:
        return unquote_to_bytes(segment).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(400, "cannot read request: the path is not UTF-8") from error


def _descend(node: dict[str, Any], segments: list[str], index: int) -> dict[str, Route] | None:
    """The methods at ``segments``; depth is bounded by the depth of the table."""
    if index == len(segments):
        methods: dict[str, Route] | None = node.get("")
        return methods
    segment = segments[index]
    if not segment:
        return None
    for key in (segment, "{}"):
        if key in node and (found := _descend(node[key], segments, index + 1)) is not None:
            return found
    return None


def _params(pattern: str, segments: list[str]) -> dict[str, str]:
    return {name[1:-1]: value for name, value in zip(_segments(pattern), segments, strict=True) if name.startswith("{")}
