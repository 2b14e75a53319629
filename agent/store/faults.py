"""Operating system errors as errors that say who must act.

A full disk may be mended and the call repeated; anything else that the disk refuses means damaged or locked-up data.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from agent.base.errors import DamagedError, TryLaterError

_SHORT = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


@contextlib.contextmanager
def storage(what: str) -> Iterator[None]:
    """Turns OSError into TryLaterError (space, memory, descriptors) or DamagedError; ``what`` reads "cannot X"."""
    try:
        yield
    except OSError as error:
        reason = f"{what}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        if error.errno in _SHORT:
            raise TryLaterError(reason, hint="free space: remove a model, or run 'edge-agent store gc'") from error
        raise DamagedError(reason, hint="check the disk and the owner and mode of the state folder") from error
