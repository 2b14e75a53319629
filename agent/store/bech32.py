"""Bech32 as age uses it (BIP 173 without its length limit), for ``age1…`` and ``AGE-SECRET-KEY-1…``.

Pure. Decoding is strict: one case throughout, a right checksum, no more padding than needed and all of it zero, so
that one value has one spelling in each case.
"""

from __future__ import annotations

_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_VALUE = {character: value for value, character in enumerate(_ALPHABET)}
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECKSUM_LENGTH = 6


def encode(prefix: str, data: bytes) -> str:
    """``data`` under the lower-case human-readable ``prefix``."""
    values = _regroup(data, 8, 5, pad=True)
    residue = _polymod([*_expand(prefix), *values, *[0] * _CHECKSUM_LENGTH]) ^ 1
    checksum = [(residue >> 5 * (_CHECKSUM_LENGTH - 1 - index)) & 31 for index in range(_CHECKSUM_LENGTH)]
    return prefix + "1" + "".join(_ALPHABET[value] for value in [*values, *checksum])


def decode(text: str) -> tuple[str, bytes]:
    """The lower-case prefix and the bytes. Raises ValueError; the text itself is never in the message."""
    if text.lower() != text and text.upper() != text:
        raise ValueError("mixed case")
    text = text.lower()
    prefix, separator, rest = text.rpartition("1")
    if not separator or not prefix or len(rest) < _CHECKSUM_LENGTH:
        raise ValueError("no separator, prefix or checksum")
    if not all("!" <= character <= "~" for character in prefix) or not all(character in _VALUE for character in rest):
        raise ValueError("a character that Bech32 does not have")
    values = [_VALUE[character] for character in rest]
    if _polymod([*_expand(prefix), *values]) != 1:
        raise ValueError("wrong checksum")
    return prefix, bytes(_regroup(bytes(values[:-_CHECKSUM_LENGTH]), 5, 8, pad=False))


def _expand(prefix: str) -> list[int]:
    codes = prefix.encode("ascii")
    return [*(code >> 5 for code in codes), 0, *(code & 31 for code in codes)]


def _polymod(values: list[int]) -> int:
    residue = 1
    for value in values:
        top = residue >> 25
        residue = (residue & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATOR):
            if top >> bit & 1:
                residue ^= generator
    return residue


def _regroup(data: bytes, width: int, to: int, *, pad: bool) -> list[int]:
    accumulator = bits = 0
    groups: list[int] = []
    for value in data:
        accumulator = accumulator << width | value
        bits += width
        while bits >= to:
            bits -= to
            groups.append(accumulator >> bits & ((1 << to) - 1))
        accumulator &= (1 << bits) - 1
    if pad and bits:
        groups.append(accumulator << (to - bits) & ((1 << to) - 1))
    elif not pad and (bits >= width or accumulator):
        raise ValueError("padding that is too long or not zero")
    return groups
