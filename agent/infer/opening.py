"""Opening one session: decrypt where that is not done yet, then load. In a worker thread that touches nothing else."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass

from agent.infer.runtimes.base import LoadOptions, Runtime, Session
from agent.infer.shelf import Form, Option, Served
from agent.infer.tiers import Item


@dataclass(frozen=True, slots=True)
class Way:
    """How a session is opened, and for what."""

    served: Served
    option: Option
    form: Form

    @property
    def item(self) -> Item:
        """As residency sees it."""
        form = self.form
        return Item(form.digest, form.session, form.size, form.shares, form.load_s, form.read_s)


class Opening:
    """One load: the plaintext and the session, made in a thread. When it is given up, what comes of it is closed."""

    def __init__(self, way: Way, descriptor: int | None, *, keep: bool) -> None:
        self.way = way
        self.descriptor = -1 if descriptor is None else descriptor
        self.stack: contextlib.ExitStack | None = None
        self.abandoned = threading.Event()
        self.load_s: float | None = None
        self.read_s: float | None = None
        self._keep = keep

    def read(self) -> None:
        """Decrypt."""
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            self.descriptor = stack.enter_context(self.way.form.open_model()).fd
            self.stack = stack.pop_all()
        self.read_s = time.monotonic() - begun

    def load(self, runtime: Runtime) -> Session:
        """Decrypt where that is not done yet, and load."""
        if self.descriptor < 0:
            self.read()
        begun = time.monotonic()
        option, form = self.way.option, self.way.form
        try:
            options = LoadOptions(option.provider, option.threads, option.parameters, form.route, form.digest)
            session = runtime.load(self.descriptor, options)
        except BaseException:
            self._drop()
            raise
        self.load_s = time.monotonic() - begun
        if self.abandoned.is_set():
            session.close()
        if self.abandoned.is_set() or not self._keep:
            self._drop()
        return session

    def _drop(self) -> None:
        stack, self.stack = self.stack, None
        if stack is not None:
            stack.close()
