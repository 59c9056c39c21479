"""The 512-byte tar header and its extensions (GNU long names, pax records) as pure functions of bytes.

Nothing here reads files; `tar_index` does, and adds the tar's name and the offset to what is raised here.
"""

from __future__ import annotations

import zlib
from typing import Final, Literal

BLOCK: Final = 512

Kind = Literal[
    "file",
    "directory",
    "hard_link",
    "symlink",
    "character_device",
    "block_device",
    "fifo",
    "sparse",
    "unsupported",
]
KINDS: Final[dict[bytes, Kind]] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard_link",
    b"2": "symlink",
    b"3": "character_device",
    b"4": "block_device",
    b"5": "directory",
    b"6": "fifo",
    b"S": "sparse",
}
WITHOUT_DATA: Final = frozenset({"hard_link", "symlink", "character_device", "block_device", "directory", "fifo"})
# Type flags of headers that describe the member after them: GNU long name and link, pax, Solaris pax, global pax.
EXTENSION_FLAGS: Final = b"LKxXg"
_MAX_SIZE_DIGITS: Final = 20


class HeaderFault(ValueError):
    """A header breaks the format; `at` is the offset of the fault from the start of the header block."""

    def __init__(self, cause: str, at: int = 0) -> None:
        super().__init__(cause)
        self.at = at


def check_header(block: bytes) -> None:
    """Check the checksum and the format of a header block.

    Raises:
        HeaderFault: if a bit of it changed, or it is no v7, ustar, GNU or pax header.
    """
    # Adler-32's low half is 1 + the sum of the bytes, exact up to 256 of them: the fastest sum at hand. The checksum
    # field counts as eight spaces.
    total = (
        (zlib.adler32(block[:148]) & 0xFFFF)
        + (zlib.adler32(block[156:412]) & 0xFFFF)
        + (zlib.adler32(block[412:]) & 0xFFFF)
        - 3
        + 8 * 0x20
    )
    field = block[148:156]
    if _octal(field) != total:
        raise HeaderFault(f"damaged header: its bytes add up to {total:o} (octal), its checksum field says {field!r}")
    magic = block[257:263]
    if magic[:5] != b"ustar" and magic != bytes(6):
        raise HeaderFault(f"unknown header format {magic!r}; v7, ustar, GNU and pax are read")


def data_size(block: bytes) -> int:
    """Bytes of data behind a header, octal or base-256.

    Raises:
        HeaderFault: if the field holds no size.
    """
    field = block[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    size = _octal(field)
    if size is None:
        if not field.strip(b" \0"):
            return 0
        raise HeaderFault(f"the header's size field is {field!r}, not a size")
    return size


def short_name(block: bytes) -> str:
    """The member's name as the header block alone gives it."""
    name = block[:100].split(b"\0", 1)[0]
    # Only POSIX headers keep the front of a long path here; GNU ones use the space for other things.
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


class Extensions:
    """What the extended headers before a member say about it."""

    def __init__(self) -> None:
        self._global: dict[str, str] = {}
        self._pax: dict[str, str] | None = None
        self._name: str | None = None
        self._seen = b""

    def add(self, flag: bytes, payload: bytes) -> None:
        """Take in an extended header of type `flag`.

        Raises:
            HeaderFault: if it is malformed, or the second of its type before one member.
        """
        if flag == b"g":
            _parse_pax(payload, self._global)
            return
        if flag in self._seen:
            raise HeaderFault(f"two extended headers of type {flag.decode()!r} before one member")
        self._seen += flag
        if flag == b"L":
            self._name = _text(payload.split(b"\0", 1)[0])
        elif flag != b"K":
            self._pax = dict(self._global)
            _parse_pax(payload, self._pax)

    @property
    def pending(self) -> bool:
        """Whether headers were taken in whose member has not come yet."""
        return bool(self._seen)

    def apply(self, block: bytes, size: int, kind: Kind) -> tuple[str, int, Kind]:
        """Name, data size and kind of the member with this header block; forgets what was said about it.

        Raises:
            HeaderFault: if a pax size is no size.
        """
        name = short_name(block) if self._name is None else self._name
        records = self._global if self._pax is None else self._pax
        if self._seen:
            self._pax, self._name, self._seen = None, None, b""
        if not records:
            return name, size, kind
        text = records.get("size")
        if text is not None:
            if not (text.isascii() and text.isdigit() and len(text) <= _MAX_SIZE_DIGITS):
                raise HeaderFault(f"pax size {text[:40]!r} is not a size")
            size = int(text)
        if kind == "file" and any(key.startswith("GNU.sparse.") for key in records):
            kind = "sparse"
        return records.get("GNU.sparse.name", records.get("path", name)), size, kind


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        return None
    return int(digits, 8)


def _parse_pax(payload: bytes, records: dict[str, str]) -> None:
    """Add the records `<length> <key>=<value>\\n` of a pax header; an empty value takes a key back."""
    at = 0
    while at < len(payload) and payload[at]:
        digits = payload[at : at + _MAX_SIZE_DIGITS].split(b" ", 1)[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = payload[at + len(digits) + 1 : end - 1].partition(b"=")
        if end <= at + len(digits) or end > len(payload) or payload[end - 1] != 0x0A or not equals:
            raise HeaderFault(f"malformed pax record {payload[at : at + 40]!r}", BLOCK + at)
        if value:
            records[_text(key)] = _text(value)
        else:
            records.pop(_text(key), None)
        at = end


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
