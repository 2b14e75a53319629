"""``diagnostics.collect``: how the device is, as a small archive without secrets. docs/spec/link.md.

Bounded: a message carries it. What does not fit is cut where it is least missed, the log first, and that is said.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agent.core.logs import redacted

#: In base64 and in an envelope it must fit 64 KiB with everything around it.
MAX_ARCHIVE_BYTES = 22 << 10
#: Names of values that are hidden. Paths of files that hold secrets may be seen, what stands in them is never read.
_HIDDEN = re.compile(r"(?i)(pass|secret|token|username|credential)")


def archive(parts: Mapping[str, Any], log: Sequence[str]) -> dict[str, Any]:
    """``parts`` as JSON files and the log as text, in a ``.tar.gz`` of at most 22 KiB, base64 in a document."""
    lines = [redacted(line) for line in log]
    files = {f"{name}.json": json.dumps(hidden(value), indent=1, default=str).encode() for name, value in parts.items()}
    left_out: list[str] = []
    while True:
        data = _packed({**files, "log.txt": "\n".join(lines).encode()})
        if len(data) <= MAX_ARCHIVE_BYTES or not (lines or files):
            break
        if lines:
            lines = lines[(len(lines) + 1) // 2 :]
            if not left_out:
                left_out.append("log lines")
        else:
            largest = max(files, key=lambda name: len(files[name]))
            del files[largest]
            left_out.append(largest)
    return {
        "format": "tar.gz",
        "files": [*files, "log.txt"],
        "left_out": left_out,
        "archive": base64.b64encode(data).decode(),
    }


def hidden(value: Any, name: str = "") -> Any:
    """``value`` with what its name calls a secret replaced."""
    if isinstance(value, Mapping):
        return {key: hidden(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hidden(item, name) for item in value]
    if isinstance(value, str):
        return "***" if value and _HIDDEN.search(name) and not name.endswith("_file") else redacted(value)
    return value


def _packed(files: Mapping[str, bytes]) -> bytes:
    import gzip  # noqa: PLC0415 - with what they bring in, a megabyte that most devices never need
    import tarfile  # noqa: PLC0415

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            tar.addfile(entry, io.BytesIO(data))
    return gzip.compress(stream.getvalue(), mtime=0)
