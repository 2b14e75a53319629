"""One call to the running core on ``admin.sock``, with its progress on the terminal, and the file that goes with it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.base.errors import AgentError, RefusedError
from agent.base.paths import Paths
from agent.cli.terminal import Progress


class Source:
    """An open descriptor for core: the file itself, or a pipe into which a thread writes the directory's bundle."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread: threading.Thread | None = None
        self.problem: Exception | None = None

    def __enter__(self) -> Source:
        if not self._path.is_dir():
            self.descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            return self
        self.descriptor, writing = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._write, args=(writing,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)  # ends the writer too, when core no longer reads
        if self._thread is not None:
            self._thread.join()

    def _write(self, writing: int) -> None:
        from agent.bundles.archive import stream_directory  # noqa: PLC0415 - only for directories

        try:
            with os.fdopen(writing, "wb") as stream:
                stream_directory(self._path, stream)
        except BrokenPipeError:
            pass  # core has hung up; its answer says why
        except (AgentError, OSError) as error:
            self.problem = error


def call_core(
    paths: Paths,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    descriptors: tuple[int, ...] = (),
    source: Source | None = None,
) -> dict[str, Any]:
    """One call with its progress on the terminal. What kept a directory from being read explains core's refusal."""
    from agent.client import AdminClient  # noqa: PLC0415 - brings asyncio in, which core's start would pay for

    with Progress() as progress:
        client = AdminClient(str(paths.admin_socket))
        try:
            answer: dict[str, Any] = client.call(method, path, body, descriptors=descriptors, on_event=progress.event)
        except AgentError as error:
            if source is not None and source.problem is not None:
                raise source.problem from error
            if isinstance(error.__cause__, PermissionError):
                # The client's own hint is for apps.
                raise RefusedError(
                    str(error), hint="only root and the agent's own user manage it; apps need infer.sock alone"
                ) from error
            raise
        except KeyboardInterrupt:
            if method != "GET":
                progress.clear()
                print("the agent goes on with it: edge-agent status", file=sys.stderr)
            raise
    return answer
