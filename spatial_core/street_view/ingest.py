"""Stage `ingest`: one raw tar -> `NNNN.parquet`, a row an image, and `NNNN_rejects.parquet`, a row a member refused.

The tar is read once, from front to back, and never extracted: a walk over its headers hands batches of members to
threads that read, decode and hash them, while the digest of the whole tar is taken close behind. Every member ends in
one of the two files, folder entries too, so kept + rejected = members.

A tar that was written again in the same size (touched, or copied anew) is compared by digest first, which costs a tenth
of ingesting it; when it holds what it held, nothing is redone.

What a damaged tar gives is a `TarError` and no file at all: rows of a tar that is cut somewhere cannot be told from a
complete one later. A tar without a single usable pair gives its rejects file, and an `InputError`.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import InputError, TarError
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.digests import sha256_file
from spatial_core.storage.hardware import usable_cores
from spatial_core.storage.parquet import parquet_sink
from spatial_core.storage.provenance import (
    FOOTER_KEY,
    Provenance,
    finished,
    read_manifest,
    record_artifact,
    renew_manifest,
    stage_key,
)
from spatial_core.storage.scratch import working_path
from spatial_core.street_view.member_checks import Fault, Finding, MemoryBudget, Task, assign_role, inspect
from spatial_core.street_view.pairing import Pairing
from spatial_core.street_view.table_buffer import TableBuffer
from spatial_core.street_view.tar_digest import FollowingDigest
from spatial_core.street_view.tar_index import TarMember, open_tar, walk
from spatial_core.street_view.waiting_halves import WaitingHalves

STAGE: Final = "ingest"
CODE_VERSION: Final = "2"
# Members a thread takes at a time: enough that handing over costs nothing, few enough that no thread waits at the end.
_BATCH_MEMBERS: Final = 32
_BATCHES_PER_THREAD: Final = 4
_COMPARED_BYTES: Final = 64 << 20

Assigned = tuple[TarMember, Task | Fault]


def ingest_tar(tar: Path, output_dir: Path, settings: Settings, progress: Progress = silent) -> Report:
    """Validate and index one raw tar.

    Args:
        tar: `NNNN.tar`; its name must match `process_tar.tar_name_pattern` and gives the data set id.
        output_dir: folder of `NNNN.parquet` (`schemas.INTERMEDIATES`) and `NNNN_rejects.parquet` (`schemas.REJECTS`).
        settings: `process_tar` and `infrastructure.threads` are used.
        progress: told bytes of the tar that are done, and their total.

    Returns:
        A report that counts members; its details hold the tar's name, size, mtime and SHA-256, images, buildings,
        states of the alignment lines, and the rejects file.

    Raises:
        InputError: if the tar is missing or ill-named, or none of its members make a valid pair.
        TarError: if the tar is damaged anywhere, or changed while it was read; names the byte offset and the cause.
        ArtifactBusy: if another process is ingesting the same tar.
    """
    dataset_id = data_set_of(tar, settings.process_tar.tar_name_pattern)
    artifact = output_dir / f"{tar.stem}.parquet"
    rejects_file = output_dir / f"{tar.stem}_rejects.parquet"
    refused_file = output_dir / f"{tar.stem}_refused.parquet"
    config = settings.pick("process_tar.row_group_size")
    fd = open_tar(tar)
    try:
        before = os.fstat(fd)
        key = _key(config, tar.name, before.st_size, before.st_mtime_ns)
        with exclusive(artifact), exclusive(rejects_file), ExitStack() as stack:
            done = finished(artifact, key)
            if done is not None and _intact(rejects_file, done):
                return done
            if (same := _written_again(fd, tar, artifact, config, progress)) is not None:
                return renew_manifest(artifact, key, {"tar": same})
            start = time.monotonic()
            # What an earlier tar of this name gave stays as it is, with its own rejects, until this one proves good.
            listing = refused_file if artifact.exists() else rejects_file
            if listing == refused_file:
                stack.enter_context(exclusive(refused_file))
            # The rejects are published before the rows and the manifest last: killed in between, the stage reruns.
            with parquet_sink(artifact, schemas.INTERMEDIATES) as row_writer:
                # Swept by `exclusive` if left behind.
                overflow = working_path(artifact.with_name(f".{artifact.name}.waiting.partial"))
                with parquet_sink(listing, schemas.REJECTS) as reject_writer, WaitingHalves(overflow) as waiting:
                    size = settings.process_tar.row_group_size
                    rows = TableBuffer(row_writer, schemas.INTERMEDIATES, size)
                    rejects = TableBuffer(reject_writer, schemas.REJECTS, size)
                    pairing = Pairing(dataset_id, tar.name, rows, rejects, waiting)
                    reading = _read_tar(fd, tar, pairing, settings.infrastructure.threads, progress)
                    rows.finish()
                    rejects.finish()
                    provenance = Provenance(STAGE, CODE_VERSION, settings.digest, config, {"tar": reading.sha256})
                    reject_writer.add_key_value_metadata({FOOTER_KEY: provenance.to_json()})
                tally = pairing.tally
                if not tally.pairs:
                    raise _no_pair(tar, tally.rejected, listing)
                listing.replace(rejects_file)
                row_writer.add_key_value_metadata({FOOTER_KEY: provenance.to_json()})
            seconds = time.monotonic() - start
            report = Report(
                stage=STAGE,
                artifact=artifact,
                rows=rows.rows,
                rows_in=reading.members,
                kept=2 * tally.pairs,
                rejected=dict(sorted(tally.rejected.items())),
                seconds=seconds,
                bytes=artifact.stat().st_size,
                unit="members",
                details={
                    "tar": {
                        "name": tar.name,
                        "bytes": before.st_size,
                        "mtime_ns": before.st_mtime_ns,
                        "sha256": reading.sha256,
                    },
                    "images": tally.pairs,
                    "buildings": pairing.buildings,
                    "alignment": dict(sorted(tally.alignment.items())),
                    "rejects": {"file": rejects_file.name, "rows": rejects.rows, "sha256": sha256_file(rejects_file)},
                    "images_per_s": round(tally.pairs / seconds, 1),
                },
            )
            record_artifact(artifact, key, provenance, report)
            return report
    finally:
        os.close(fd)


def _no_pair(tar: Path, rejected: Counter[str], listed: Path) -> InputError:
    counts = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
    if not counts:
        return InputError(f"{tar}: no valid pair of image and text among 0 members (the tar is empty)")
    members = rejected.total()
    return InputError(
        f"{tar}: no valid pair of image and text among {members} members ({counts}); each is listed in {listed}"
    )


def data_set_of(tar: Path, name_pattern: str) -> int:
    """The data set id that a tar's file name stands for.

    Raises:
        InputError: if the name does not match the pattern, or its stem is no number.
    """
    if not re.fullmatch(name_pattern, tar.name):
        raise InputError(f"{tar}: the file name must match {name_pattern} (process_tar.tar_name_pattern)")
    if not (tar.stem.isascii() and tar.stem.isdigit()):
        raise InputError(f"{tar}: the name before .tar must be the data set number, found {tar.stem!r}")
    return int(tar.stem)


def _key(config: Mapping[str, Any], name: str, size: int, mtime_ns: int) -> str:
    return stage_key(STAGE, CODE_VERSION, config, {"tar": [name, size, mtime_ns]})


def _written_again(
    fd: int, tar: Path, artifact: Path, config: Mapping[str, Any], progress: Progress
) -> dict[str, Any] | None:
    """What is recorded of the tar of a finished artifact, if all that changed since is its time; None otherwise."""
    manifest = read_manifest(artifact)
    recorded = {} if manifest is None else manifest["report"]["details"].get("tar", {})
    now = os.fstat(fd)
    if recorded.get("bytes") != now.st_size:
        return None
    done = finished(artifact, _key(config, tar.name, now.st_size, recorded["mtime_ns"]))
    if done is None or not _intact(artifact.with_name(done.details["rejects"]["file"]), done):
        return None
    with FollowingDigest(fd, tar, now.st_size) as digest:
        for position in range(0, now.st_size, _COMPARED_BYTES):
            digest.follow(position)
            progress(position, now.st_size, f"{tar.name}: written again, comparing its content")
        sha256 = digest.hexdigest()
    _check_unchanged(fd, tar, now)
    if sha256 != recorded["sha256"]:
        return None
    progress(now.st_size, now.st_size, f"{tar.name}: the same content as before")
    return {**recorded, "mtime_ns": now.st_mtime_ns}


@dataclass
class _Reading:
    members: int = 0
    sha256: str = ""


def _read_tar(fd: int, tar: Path, pairing: Pairing, threads: int, progress: Progress) -> _Reading:
    """Walk, inspect and digest the tar; findings reach `pairing` in tar order whatever the threads do."""
    before = os.fstat(fd)
    threads = threads or usable_cores()
    budget = MemoryBudget()
    reading = _Reading()
    waiting: deque[tuple[list[Assigned], Future[list[Finding]]]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="inspect")
    with FollowingDigest(fd, tar, before.st_size) as digest:
        try:
            for batch in _batches(_counted(walk(fd, tar), reading)):
                tasks = [assigned for _, assigned in batch if isinstance(assigned, Task)]
                waiting.append((batch, pool.submit(inspect, fd, tar, tasks, pairing.dataset_id, budget)))
                position = batch[-1][0].data_offset + batch[-1][0].size
                digest.follow(position)
                if len(waiting) > _BATCHES_PER_THREAD * threads:
                    _settle(*waiting.popleft(), pairing)
                    progress(position, before.st_size, f"{tar.name}: {pairing.tally.pairs} images")
            while waiting:
                _settle(*waiting.popleft(), pairing)
            pairing.finish()
            reading.sha256 = digest.hexdigest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    _check_unchanged(fd, tar, before)
    progress(before.st_size, before.st_size, f"{tar.name}: {pairing.tally.pairs} images")
    return reading


def _counted(members: Iterator[TarMember], reading: _Reading) -> Iterator[TarMember]:
    for member in members:
        reading.members += 1
        yield member


def _batches(members: Iterator[TarMember]) -> Iterator[list[Assigned]]:
    batch: list[Assigned] = []
    for member in members:
        batch.append((member, assign_role(member)))
        if len(batch) == _BATCH_MEMBERS:
            yield batch
            batch = []
    if batch:
        yield batch


def _settle(batch: list[Assigned], inspection: Future[list[Finding]], pairing: Pairing) -> None:
    findings = iter(inspection.result())
    for member, assigned in batch:
        if isinstance(assigned, Fault):
            pairing.reject(member, assigned)
        else:
            pairing.take(assigned, next(findings))


def _check_unchanged(fd: int, tar: Path, before: os.stat_result) -> None:
    """The open file must be as it was, and still be the one of this name."""
    try:
        named = tar.stat()
    except OSError as error:
        raise TarError(f"{tar}: byte {before.st_size}: it was removed while it was read ({error.strerror})") from error
    for now in (os.fstat(fd), named):
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
            raise TarError(
                f"{tar}: byte {min(now.st_size, before.st_size)}: it was changed or replaced while it was read "
                f"({before.st_size} bytes when opened, {now.st_size} now); run again once it is whole"
            )


def _intact(rejects_file: Path, done: Report) -> bool:
    recorded: dict[str, Any] = done.details["rejects"]
    return rejects_file.exists() and sha256_file(rejects_file) == recorded["sha256"]
