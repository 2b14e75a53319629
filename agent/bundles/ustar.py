"""Tar headers, the plain kind only: POSIX ustar members that are regular files with plain names.

Pure. Strict on purpose: a bundle is made by our own packer or by any tar told to write plain files, and everything
else that a tar header can say (links, devices, directories, sparse maps, extended names and sizes) is refused rather
than interpreted. The one concession are POSIX extended headers that only date or annotate a member, which common tar
programs write by default: they are read within a bound and ignored.
Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header".
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.base.errors import PeerError

BLOCK = 512
#: Largest extended header that is looked at; real ones with only times in them have some dozen bytes.
MAX_EXTENDED_BYTES = 8192

_REGULAR = (b"0", b"\0")
_EXTENDED = b"x"
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
    b"5": "a directory", b"6": "a FIFO", b"7": "a contiguous file", b"g": "a global extended header",
    b"L": "a GNU long name", b"K": "a GNU long link name", b"S": "a sparse file", b"V": "a volume header",
    b"M": "a continued file", b"D": "a GNU directory dump",
}  # fmt: skip
#: Mode, owner, group, date, device: not used, but a reader that does look at them must not stumble and stop there.
_UNUSED_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
#: Keywords of an extended header that change neither name nor content of the member.
_HARMLESS = frozenset({"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"})
_PLAIN_HINT = "pack it with edge-fleet pack, or with tar --format=ustar and plain file names"


@dataclass(frozen=True, slots=True)
class Header:
    """What a member's header says: its name, its size in bytes, and whether it only annotates the next member."""

    name: str
    size: int
    extended: bool = False


def encode_header(name: str, size: int) -> bytes:
    """The 512 bytes before a regular file: no owner, no date, mode 0644, so that equal contents give equal tars."""
    raw_name = name.encode("ascii")
    if len(raw_name) > 100 or not 0 <= size < 8**11:
        raise ValueError(f"{name!r} with {size} bytes does not fit a plain tar header")
    fields = [
        raw_name.ljust(100, b"\0"),
        b"0000644\0", b"0000000\0", b"0000000\0",
        b"%011o\0" % size,
        b"%011o\0" % 0,
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\x0000",
        bytes(32), bytes(32),
        b"0000000\0", b"0000000\0",
        bytes(155 + 12),
    ]  # fmt: skip
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size: int) -> int:
    """Zero bytes that follow a member of ``size`` bytes up to the next block."""
    return -size % BLOCK


def decode_header(block: bytes) -> Header:
    """The header in ``block`` (512 bytes, not all zero). PeerError for anything but a plain regular file."""
    _check_sum(block)
    if block[257:265] not in (b"ustar\x0000", b"ustar  \0"):
        raise PeerError("cannot read bundle: a header is not of the ustar format", hint=_PLAIN_HINT)
    name = _plain_name(block[0:100])
    kind = block[156:157]
    size = _octal(block[124:136], name)
    for start, end in _UNUSED_NUMBERS:
        _check_unused(block[start:end], name)
    if kind == _EXTENDED:
        if size > MAX_EXTENDED_BYTES:
            raise PeerError(f"cannot read bundle: extended header of {size} bytes", hint=_PLAIN_HINT)
        return Header(name, size, extended=True)
    if kind not in _REGULAR:
        what = _KINDS.get(kind, f"of an unknown kind ({kind!r})")
        raise PeerError(f"cannot read bundle: {name!r} is {what}; only regular files belong in it", hint=_PLAIN_HINT)
    if any(block[157:257]) or any(block[345:500]):
        raise PeerError(f"cannot read bundle: {name!r} has a link target or a folder", hint=_PLAIN_HINT)
    return Header(name, size)


def check_extended(data: bytes) -> None:
    """Refuse an extended header that would change what the next member is. PeerError names the keyword."""
    rest = data
    while rest:
        digits, space, _ = rest.partition(b" ")
        length = int(digits) if space and len(digits) <= 5 and digits.isdigit() else 0
        record = rest[len(digits) + 1 : length]
        keyword, equals, _ = record.partition(b"=")
        if length > len(rest) or not equals or not record.endswith(b"\n"):
            raise PeerError("cannot read bundle: malformed extended header", hint=_PLAIN_HINT)
        word = keyword.decode("ascii", "replace")
        if word not in _HARMLESS and not word.startswith("LIBARCHIVE."):
            raise PeerError(f"cannot read bundle: extended header sets {word!r}", hint=_PLAIN_HINT)
        rest = rest[length:]


def _check_sum(block: bytes) -> None:
    stored = _octal(block[148:156], "header")
    if sum(block[:148]) + 8 * 0x20 + sum(block[156:]) != stored:
        raise PeerError("cannot read bundle: a header's checksum is wrong", hint="the file is damaged or no bundle")


def _plain_name(field: bytes) -> str:
    raw, _, after = field.partition(b"\0")
    if any(after):
        # Readers differ on what follows the first NUL: no such name means one thing to all of them.
        raise PeerError("cannot read bundle: a file name goes on after its end")
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise PeerError(f"cannot read bundle: file name {raw!r} is not plain", hint=_PLAIN_HINT) from error


def _check_unused(field: bytes, name: str) -> None:
    """Octal, empty, or the base-256 coding of GNU tar for what octal is too short for."""
    if field[0] not in (0x80, 0xFF) and field.strip(b"\0 "):
        _octal(field, name)


def _octal(field: bytes, name: str) -> int:
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits or any(digit not in b"01234567" for digit in digits):
        raise PeerError(f"cannot read bundle: {name!r} has a number that is not plain octal", hint=_PLAIN_HINT)
    return int(digits, 8)
