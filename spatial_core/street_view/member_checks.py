"""What a single tar member is worth: a facade view, a sound image, or a reason for its rejection.

Names are sorted into roles here, and the bytes of images and texts are read and judged, a batch of members at a time in
worker threads: reading, hashing and decoding all release the interpreter lock.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from spatial_core.errors import TarError
from spatial_core.images.decode import ImageError, check_jpeg, read_header
from spatial_core.street_view.metadata import MAX_TEXT_BYTES, FacadeView, MetadataError, parse_metadata
from spatial_core.street_view.tar_index import TarMember

# The largest image that decoding accepts, 64 million pixels, is far smaller than this as a JPEG.
MAX_IMAGE_BYTES: Final = 64 << 20
# What the images in work may take together: their bytes, their pixels, and as much again inside the decoder. Enough for
# thirty threads on images of the data set's size.
_WORK_BYTES: Final = 96 << 20
_BYTES_PER_PIXEL: Final = 6
_USUAL_PIXEL_BYTES: Final = 640 * 640 * _BYTES_PER_PIXEL
_IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg"})
_KINDS_IN_WORDS: Final = {
    "directory": "a folder",
    "hard_link": "a hard link",
    "symlink": "a symbolic link",
    "character_device": "a character device",
    "block_device": "a block device",
    "fifo": "a named pipe",
    "sparse": "a sparse file, stored with its holes cut out",
    "unsupported": "of a vendor's member type",
}

Role = Literal["image", "text"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a member cannot be used: a short code for counting, and what was found."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """A sound image: size in pixels and the SHA-256 of its bytes."""

    width: int
    height: int
    sha256: bytes


class Task(NamedTuple):
    """An image or text to be read, and the path without suffix that it shares with its partner."""

    member: TarMember
    role: Role
    stem: str


Finding = FacadeView | ImageFacts | Fault


def assign_role(member: TarMember) -> Task | Fault:
    """Tell images from texts by suffix, in any case, at any folder depth; anything else is a fault."""
    fault = _unsafe(member.name)
    if fault is not None:
        return fault
    if member.kind != "file":
        return Fault(member.kind, f"the member is {_KINDS_IN_WORDS[member.kind]}")
    stem, dot, suffix = member.name.removeprefix("./").rpartition(".")
    suffix = (dot + suffix).lower()
    if stem and not stem.endswith("/"):
        if suffix in _IMAGE_SUFFIXES:
            return Task(member, "image", stem)
        if suffix == ".txt":
            return Task(member, "text", stem)
    return Fault("unknown_suffix", f"the name ends in {suffix[-20:]!r}; .jpg, .jpeg and .txt are known")


def _unsafe(name: str) -> Fault | None:
    """A name that would reach outside a folder, or that no file of the data set can have."""
    if not name:
        return Fault("unsafe_name", "the name is empty")
    if name[0] == "/":
        return Fault("unsafe_name", "the name is an absolute path")
    if ".." in name and ".." in name.split("/"):
        return Fault("unsafe_name", "the name leads out of its folder through '..'")
    if not name.isprintable() or "\\" in name:
        return Fault("unsafe_name", "the name has a backslash, a control character or bytes that are not UTF-8")
    return None


class MemoryBudget:
    """Lets threads work on images side by side as long as those fit together; a larger one works alone."""

    def __init__(self, capacity: int = _WORK_BYTES) -> None:
        self.capacity = capacity
        self._free = capacity
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Wait until `amount` bytes, or all of the budget if that is less, are free; give them back at the end."""
        amount = min(amount, self.capacity)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


def inspect(fd: int, path: Path, tasks: Sequence[Task], dataset_id: int, budget: MemoryBudget) -> list[Finding]:
    """Read and judge a batch of members; one finding a task, in order.

    Args:
        fd: the tar, open for reading; its position is neither used nor moved.
        path: its name, for messages.
        tasks: images and texts.
        dataset_id: the data set that the tar's name stands for.
        budget: shared by all threads.

    Raises:
        TarError: if the tar ends before a member's data does.
    """
    findings: list[Finding] = []
    for task in tasks:
        try:
            if task.role == "image":
                findings.append(_inspect_image(fd, path, task.member, budget))
            else:
                findings.append(_inspect_text(fd, path, task.member, dataset_id))
        except (ImageError, MetadataError) as error:
            findings.append(Fault(error.reason, str(error)))
    return findings


def _inspect_text(fd: int, path: Path, member: TarMember, dataset_id: int) -> FacadeView:
    if member.size > MAX_TEXT_BYTES:
        raise MetadataError("text_too_long", f"{member.size} bytes of text; at most {MAX_TEXT_BYTES}")
    return parse_metadata(_read(fd, path, member), dataset_id)


def _inspect_image(fd: int, path: Path, member: TarMember, budget: MemoryBudget) -> ImageFacts:
    if member.size > MAX_IMAGE_BYTES:
        raise ImageError("image_too_many_bytes", f"{member.size} bytes of image; at most {MAX_IMAGE_BYTES}")
    usual = member.size + _USUAL_PIXEL_BYTES
    with budget.hold(usual):
        data = _read(fd, path, member)
        header = read_header(data)
        need = member.size + header.width * header.height * _BYTES_PER_PIXEL
        if need <= usual:
            return _judge(data)
        del data  # waiting for more while holding some could stop every thread
    with budget.hold(need):
        return _judge(_read(fd, path, member))


def _judge(data: bytes) -> ImageFacts:
    header = check_jpeg(data)
    return ImageFacts(header.width, header.height, hashlib.sha256(data).digest())


def _read(fd: int, path: Path, member: TarMember) -> bytes:
    data = os.pread(fd, member.size, member.data_offset)
    if len(data) != member.size:
        raise TarError(
            f"{path}: byte {member.data_offset + len(data)}: the file ends inside the data of {member.name!r}; "
            "it shrank while it was read"
        )
    return data
