"""Operating system errors as errors that say who must act.

A shortage may pass and the call be repeated; anything else that the disk refuses means damaged or locked-up data. A
shortage must never be taken for damage: a blob marked damaged for want of a descriptor would be fetched again for
nothing, and lost when the key rotates.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from agent.base.errors import DamagedError, TryLaterError
from agent.store.age import AgeError

_SHORT = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}


@contextlib.contextmanager
def storage(what: str) -> Iterator[None]:
    """Turns OSError into TryLaterError (space, memory, descriptors) or DamagedError; ``what`` reads "cannot X"."""
    try:
        yield
    except OSError as error:
        raise_if_short(error, what)
        reason = f"{what}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise DamagedError(reason, hint="check the disk and the owner and mode of the state folder") from error


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns OSError into AgeError: the file ``what`` ("payload", "header") is as good as damaged, or TryLaterError."""
    try:
        yield
    except OSError as error:
        raise_if_short(error, f"cannot read {what}")
        raise AgeError(f"{what}: {error.strerror}") from error


def raise_if_short(error: OSError, what: str) -> None:
    """TryLaterError when ``error`` tells of a shortage; otherwise nothing."""
    if error.errno in _SHORT:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "remove a model, or run 'edge-agent store gc'" if full else "free memory or raise the service's limits"
        raise TryLaterError(f"{what}: {os.strerror(error.errno)}", hint=hint) from error
