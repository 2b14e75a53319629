"""What is installed, as the engine sees it: versions with their options in order of choice. Pure.

The shelf is replaced as a whole whenever the catalog changes; nothing in it is ever changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.base.errors import NotFoundError
from agent.infer.runtimes.base import PLAIN, Route

if TYPE_CHECKING:
    from agent.bundles.manifest import TensorSpec
    from agent.infer.cascade import Cascade
    from agent.infer.gains import Batching
    from agent.infer.trial import OpenModel


_MIB = 1 << 20
#: Decrypting takes about so long for a byte, loading for a megabyte that it takes, until it was measured.
_READ_S, _LOAD_S = 1e-9, 1e-3


class SessionName(NamedTuple):
    """What a session is called: whose it is, which option, of which bytes, in which form."""

    model: str
    version: str
    candidate: str
    digest: str
    form: str


@dataclass(frozen=True, slots=True)
class Form:
    """One way to open an option: a file, and what to make of it. Sizes in bytes, seconds as measured on this device.

    ``session`` is what it holds beside the plaintext of ``size`` bytes (0: the plaintext is not kept); ``shares``: its
    weights are the plaintext's own pages. ``run_s`` is a steady run, None where only one form was measured.
    """

    name: str
    open_model: Callable[[], OpenModel]
    digest: str
    session: int
    size: int = 0
    shares: bool = False
    load_s: float = 0.0
    run_s: float | None = None
    route: Route = PLAIN

    @property
    def read_s(self) -> float:
        """Seconds to decrypt it, as far as one can tell from its size."""
        return self.size * _READ_S


@dataclass(frozen=True, slots=True)
class Option:
    """One way to answer: a variant on a provider. ``need_mb`` is its measured or estimated footprint."""

    candidate: str
    variant: str
    runtime: str
    provider: str
    threads: int
    need_mb: float
    open_model: Callable[[], OpenModel]
    #: 95th percentile of a run in ms as the trial measured it; None where it was never measured.
    p95_ms: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    #: The blob's identity: a session made from other bytes is another session.
    digest: str = ""
    #: Bytes of the decrypted file; 0 where it is not to be kept. And how long it takes to load.
    size: int = 0
    load_s: float = 0.0
    #: Whether a session's weights are the file's own pages, which are then part of ``need_mb``.
    shares: bool = False
    #: Prepared forms: the first answers first, the last in the long run. None: it is opened as it is.
    forms: tuple[Form, ...] = ()
    #: How requests are joined, where that was asked for.
    batching: Batching | None = None
    #: The median run in ms, joules of a run, and the quality by which variants were compared, as far as they are known.
    p50_ms: float | None = None
    joules: float | None = None
    quality: float | None = None

    def ways(self) -> tuple[Form, ...]:
        """Its forms; the file as it came where nothing was prepared."""
        return self.forms or (self.plain(),)

    def plain(self) -> Form:
        """The file as it came: what is left when a prepared form cannot be had."""
        need = self.need_mb * _MIB - (self.size if self.shares else 0)
        need = max(0.1 * self.need_mb * _MIB, need)
        load_s = self.load_s or self.need_mb * _LOAD_S
        return Form("plain", self.open_model, self.digest, int(need), self.size, self.shares, load_s)


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """A model's answers are kept for ``ttl_s`` seconds, in at most ``size`` bytes. ``prewarm``: after a change the most
    wanted ones are computed again before they are asked for."""

    ttl_s: float
    size: int
    prewarm: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """A version of a model with its options, best first; empty with ``reason`` where none can answer."""

    model: str
    version: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    options: tuple[Option, ...]
    reason: str = ""
    labels: tuple[str, ...] = ()
    task: str = ""
    #: None: its answers are not kept.
    cache: CacheLimits | None = None
    #: Whether the governor may have another option answer.
    governed: bool = True
    #: Two options that answer together; and why those that were asked for do not.
    cascade: Cascade | None = None
    no_cascade: str = ""


@dataclass(frozen=True, slots=True)
class Shelf:
    """All models: versions by (model, version), and the active version by model."""

    versions: Mapping[tuple[str, str], Served] = field(default_factory=dict)
    active: Mapping[str, str] = field(default_factory=dict)

    def find(self, model: str, version: str | None = None) -> Served:
        """The version asked for, or the active one. NotFoundError names what is missing."""
        wanted = version if version is not None else self.active.get(model)
        if wanted is not None and (served := self.versions.get((model, wanted))) is not None:
            return served
        if not any(name == model for name, _ in self.versions):
            raise NotFoundError(f"model '{model}': no such model")
        if wanted is None:
            raise NotFoundError(f"model '{model}': no version is active")
        raise NotFoundError(f"model '{model}': no version '{wanted}'")
