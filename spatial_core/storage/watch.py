"""Which files of a watched folder are whole, new, replaced or gone, as a pure step from one observation to the next.

A file counts as whole when two observations in a row find it with the same size and modification time. One look never
suffices: `cp -p` and `rsync -t` give a file an old time while its bytes still arrive, and a rename cannot be told from
a file that was always there. Copies that arrive under a dotted name and are renamed are whole at once and simply wait
for the second observation too. An empty file is never whole.

Nothing here depends on the clock except the time budget: the state is what was seen. A listing is cheap, a `stat` on a
network file system is not, so names are visited in sorted order until the budget is used up, and the next observation
continues there.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spatial_core.errors import ArtifactError, InputError

_STATE_VERSION = 1
_MAX_UNFIT = 1000

Stamp = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """A whole file: its name in the folder, size in bytes and modification time in nanoseconds since the epoch."""

    name: str
    bytes: int
    mtime_ns: int

    @property
    def key(self) -> str:
        """Partition key: the name without its suffix."""
        return self.name.rpartition(".")[0]

    @property
    def version(self) -> str:
        """Identity of the content as far as a `stat` can tell."""
        return f"{self.bytes}-{self.mtime_ns}"


@dataclass(frozen=True)
class WatchState:
    """What was seen, name -> (size, mtime_ns).

    Args:
        known: whole files that were reported.
        pending: files seen once in this form, or still changing.
        gone: reported files that are no longer in the folder.
        unfit: names that were reported as unfit, so that they are reported once.
        resume: first name that the next observation visits; empty = from the beginning.
    """

    known: Mapping[str, Stamp] = field(default_factory=dict)
    pending: Mapping[str, Stamp] = field(default_factory=dict)
    gone: Mapping[str, Stamp] = field(default_factory=dict)
    unfit: tuple[str, ...] = ()
    resume: str = ""

    def to_json(self) -> str:
        record = {
            "v": _STATE_VERSION,
            "known": self.known,
            "pending": self.pending,
            "gone": self.gone,
            "unfit": self.unfit,
            "resume": self.resume,
        }
        return json.dumps(record, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None) -> WatchState:
        """Inverse of `to_json`; None or an empty text is the state before the first observation.

        Raises:
            ArtifactError: if the text is not a state of this version.
        """
        if not text:
            return cls()
        try:
            record = json.loads(text)
            if record["v"] != _STATE_VERSION:
                raise ArtifactError(f"watch state of version {record['v']!r}, expected {_STATE_VERSION}")
            return cls(
                known=_stamps(record["known"]),
                pending=_stamps(record["pending"]),
                gone=_stamps(record["gone"]),
                unfit=tuple(str(name) for name in record["unfit"]),
                resume=str(record["resume"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"damaged watch state ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Scan:
    """One observation.

    Args:
        new: files that are whole for the first time.
        changed: known files that were replaced and are whole again.
        back: files that were gone and are back unchanged.
        gone: names of known files that left the folder since the last observation.
        pending: names that are not whole yet.
        unfit: name -> why it cannot be registered; each name once.
        state: what to remember.
        complete: whether every name was visited within the budget.
    """

    new: tuple[Found, ...]
    changed: tuple[Found, ...]
    back: tuple[Found, ...]
    gone: tuple[str, ...]
    pending: tuple[str, ...]
    unfit: Mapping[str, str]
    state: WatchState
    complete: bool


@dataclass(frozen=True)
class Rules:
    """Which names fit.

    Args:
        suffix: `.tar` or `.parquet`; what stands before it is the partition key.
        name_pattern: regular expression the whole name must match (a setting).
        key_pattern: regular expression the whole key must match, whatever the setting allows: keys become file names.
    """

    suffix: str
    name_pattern: str
    key_pattern: re.Pattern[str]

    def fault(self, name: str) -> str | None:
        """Why a name cannot be registered, or None when it can."""
        if not name.endswith(self.suffix):
            return f"does not end in {self.suffix}"
        if re.fullmatch(self.name_pattern, name) is None:
            return f"does not match {self.name_pattern}"
        if self.key_pattern.fullmatch(name.removesuffix(self.suffix)) is None:
            return f"its key does not match {self.key_pattern.pattern}"
        return None


def scan(
    folder: Path,
    rules: Rules,
    previous: WatchState,
    *,
    budget_s: float,
    limit: int = 1_000,
    clock: Callable[[], float] = time.monotonic,
) -> Scan:
    """Observe a folder once.

    Names that start with a dot are temporary by convention and ignored; symbolic links are followed, so that large
    archives may stay where they are. At least one file is visited whatever the budget.

    Args:
        folder: what to look at; not recursive.
        rules: which names fit.
        previous: state of the observation before.
        budget_s: seconds after which the rest waits for the next observation.
        limit: files reported as new or changed, at most.
        clock: seconds, monotonic.

    Raises:
        InputError: if the folder cannot be listed; nothing is then concluded about its files.
    """
    deadline = clock() + budget_s
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208 names only
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from error
    unfit = {name: fault for name in names if (fault := rules.fault(name)) is not None}
    fit = [name for name in names if name not in unfit]
    present = set(fit)
    known = {name: stamp for name, stamp in previous.known.items() if name in present}
    gone = {name: stamp for name, stamp in previous.known.items() if name not in present}
    left = tuple(sorted(gone))
    gone |= {name: stamp for name, stamp in previous.gone.items() if name not in gone}
    pending = {name: stamp for name, stamp in previous.pending.items() if name in present}

    reported: dict[str, list[Found]] = {"new": [], "changed": [], "back": []}
    resume = ""
    start = next((index for index, name in enumerate(fit) if name >= previous.resume), 0)
    for visited, name in enumerate(fit[start:] + fit[:start]):
        full = len(reported["new"]) + len(reported["changed"]) >= limit
        if visited and (full or clock() > deadline):
            resume = name
            break
        try:
            status = (folder / name).stat()
        except FileNotFoundError:
            if (folder / name).is_symlink():
                unfit[name] = "is a link to nothing"
            continue
        except OSError as error:
            unfit[name] = f"cannot be read ({error.strerror})"
            continue
        if not stat.S_ISREG(status.st_mode):
            unfit[name] = "is not a regular file"
            continue
        stamp = (status.st_size, status.st_mtime_ns)
        if known.get(name) == stamp:
            pending.pop(name, None)
        elif gone.get(name) == stamp:
            known[name] = gone.pop(name)
            reported["back"].append(Found(name, *stamp))
        elif status.st_size and pending.get(name) == stamp:
            seen_before = name in known or name in gone
            reported["changed" if seen_before else "new"].append(Found(name, *stamp))
            known[name] = pending.pop(name)
            gone.pop(name, None)
        else:
            pending[name] = stamp
    news = [name for name in unfit if name not in set(previous.unfit)]
    remembered = tuple(sorted(unfit))[:_MAX_UNFIT]
    return Scan(
        new=tuple(reported["new"]),
        changed=tuple(reported["changed"]),
        back=tuple(reported["back"]),
        gone=left,
        pending=tuple(sorted(pending)),
        unfit={name: unfit[name] for name in news if name in remembered},
        state=WatchState(known, pending, gone, remembered, resume),
        complete=not resume,
    )


def _stamps(record: Mapping[str, list[int]]) -> dict[str, Stamp]:
    return {str(name): (int(size), int(mtime_ns)) for name, (size, mtime_ns) in record.items()}
