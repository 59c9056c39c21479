"""A strict walk over the members of a tar archive (v7, ustar, GNU, pax).

The standard library's `tarfile` treats a cut at a member boundary, a cut inside a header, a flipped header bit or a
zeroed block as the end of the archive and returns the members before it without an error. Here an archive is whole only
when every header's checksum holds, every member's data lies inside the file, two zero blocks end it and nothing but
zeros follows them; anything else raises `TarError` with the byte offset and the cause.

Only headers are read, with `pread`, so nothing stays mapped, and an archive that shrinks meanwhile is a `TarError`, not
a SIGBUS. Members come one by one: memory does not grow with their number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from spatial_core.errors import InputError, TarError
from spatial_core.street_view.tar_headers import (
    BLOCK,
    EXTENSION_FLAGS,
    KINDS,
    WITHOUT_DATA,
    Extensions,
    HeaderFault,
    Kind,
    check_header,
    data_size,
)

_ZERO_BLOCK: Final = bytes(BLOCK)
_TAIL_CHUNK: Final = 1 << 20
# Long names and pax records are held in memory; real ones are far below this.
_MAX_EXTENSION_BYTES: Final = 1 << 20
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstandard",
}


class TarMember(NamedTuple):
    """One member.

    Args:
        name: as stored; bytes that are not UTF-8 are surrogate escapes.
        kind: what it is; "unsupported" are vendor types, "sparse" files are stored with their holes cut out.
        offset: byte offset of its first header block, long-name and pax headers included.
        data_offset: byte offset of its data.
        size: bytes of data stored in the archive; 0 for kinds that have none.
    """

    name: str
    kind: Kind
    offset: int
    data_offset: int
    size: int


def open_tar(path: Path) -> int:
    """Open a tar for `walk`, as a file descriptor that the caller closes.

    Raises:
        InputError: if it is missing, unreadable, or not a regular file.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})") from error


def read_members(path: Path) -> Iterator[TarMember]:
    """Every member of the tar at `path`, in order.

    Raises:
        InputError: as `open_tar`.
        TarError: as `walk`.
    """
    fd = open_tar(path)
    try:
        yield from walk(fd, path)
    finally:
        os.close(fd)


def walk(fd: int, path: Path) -> Iterator[TarMember]:
    """Every member of an open tar, in order, each as soon as its header is read and its data known to fit the file.

    Damage behind a member shows only after it was yielded: what was read counts once the iterator ends without error.

    Args:
        fd: a regular file open for reading; its position is neither used nor moved.
        path: its name, for messages.

    Raises:
        TarError: at the first damage, naming the tar, the byte offset and the cause.
    """
    file_size = os.fstat(fd).st_size
    _refuse_other_formats(fd, path, file_size)
    extensions = Extensions()
    start = position = 0
    try:
        while (block := os.pread(fd, BLOCK, position)) != _ZERO_BLOCK:
            if len(block) != BLOCK:
                raise _cut(fd, path, file_size, position, len(block))
            check_header(block)
            size = data_size(block)
            data_offset = position + BLOCK
            flag = block[156:157]
            if flag in EXTENSION_FLAGS:
                extensions.add(flag, _read_extension(fd, path, file_size, data_offset, size))
                position = data_offset + -(-size // BLOCK) * BLOCK
                if not extensions.pending:  # a global header stands alone
                    start = position
                continue
            name, size, kind = extensions.apply(block, size, KINDS.get(flag, "unsupported"))
            if flag == b"\0" and name.endswith("/"):
                kind = "directory"  # how archives older than ustar mark one
            if kind in WITHOUT_DATA:
                size = 0
            elif flag == b"S":
                data_offset = _behind_sparse_map(fd, path, file_size, block, data_offset)
            if data_offset + size > file_size:
                raise HeaderFault(
                    f"the archive is cut inside the data of {name!r}, which ends at byte {data_offset + size}; "
                    f"the file has {file_size}"
                )
            yield TarMember(name, kind, start, data_offset, size)
            start = position = data_offset + -(-size // BLOCK) * BLOCK
        if extensions.pending:
            raise HeaderFault(f"the archive ends after the extended header at byte {start}, without its member")
    except HeaderFault as fault:
        raise TarError(f"{path}: byte {position + fault.at}: {fault}") from fault
    _check_end(fd, path, file_size, position)


def _refuse_other_formats(fd: int, path: Path, file_size: int) -> None:
    if file_size == 0:
        raise TarError(f"{path}: byte 0: the file is empty")
    head = os.pread(fd, 8, 0)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise TarError(f"{path}: byte 0: the file is {name} data, not a plain tar; unpack it first")


def _cut(fd: int, path: Path, file_size: int, position: int, found: int) -> TarError:
    """Why a block could not be read whole."""
    now = os.fstat(fd).st_size
    if now < file_size:
        cause = f"the file shrank from {file_size} to {now} bytes while it was read"
    elif found:
        cause = f"the archive is cut inside a header: {found} of {BLOCK} bytes are left"
    elif position == file_size:
        cause = "the archive ends at a member boundary, without its end marker of two zero blocks"
    else:
        cause = f"the archive is cut inside the padding of a member's data, at byte {file_size}"
    return TarError(f"{path}: byte {position}: {cause}")


def _read_extension(fd: int, path: Path, file_size: int, offset: int, size: int) -> bytes:
    if size > _MAX_EXTENSION_BYTES:
        raise HeaderFault(f"an extended header of {size} bytes; at most {_MAX_EXTENSION_BYTES} are read")
    payload = os.pread(fd, size, offset)
    if len(payload) != size:
        raise _cut(fd, path, file_size, offset, len(payload))
    return payload


def _behind_sparse_map(fd: int, path: Path, file_size: int, block: bytes, offset: int) -> int:
    """Offset of an old GNU sparse member's data: behind the map blocks that do not fit its header."""
    more = block[482]
    while more:
        extra = os.pread(fd, BLOCK, offset)
        if len(extra) != BLOCK:
            raise _cut(fd, path, file_size, offset, len(extra))
        more = extra[504]
        offset += BLOCK
    return offset


def _check_end(fd: int, path: Path, file_size: int, position: int) -> None:
    """The zero block at `position` must be followed by another, and nothing but zeros up to the end of the file."""
    second = os.pread(fd, BLOCK, position + BLOCK)
    if second != _ZERO_BLOCK:
        if second.strip(b"\0"):
            raise TarError(f"{path}: byte {position}: a zero block in the middle of the archive, with data behind it")
        raise TarError(f"{path}: byte {position}: the archive ends with one zero block; its end marker has two")
    offset = position + 2 * BLOCK
    zeros = bytes(_TAIL_CHUNK)
    while offset < file_size:
        chunk = os.pread(fd, _TAIL_CHUNK, offset)
        if not chunk:
            raise _cut(fd, path, file_size, offset, 0)
        if chunk != zeros[: len(chunk)]:
            first = offset + len(chunk) - len(chunk.lstrip(b"\0"))
            raise TarError(f"{path}: byte {first}: data behind the end marker, which stands at byte {position}")
        offset += len(chunk)
