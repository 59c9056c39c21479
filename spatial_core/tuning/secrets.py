"""Secrets of the study database: where a URL with a password may lie, and what of it may be shown.

A URL with a password lies in one file that its owner alone can read. Everything else (settings, calls of stages,
command lines, logs, artifacts) carries the path of that file.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from spatial_core.errors import ConfigError, InputError
from spatial_core.storage.atomic import atomic_file

# In `paths.tuning_dir`, unless a file was named.
URL_FILE = "storage.url"
_ITERATIONS = 4096


def write_secret(path: Path, text: str) -> None:
    """Write a line that the owner alone can read, atomically; at no time can anybody else."""
    with atomic_file(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write(text + "\n")


def read_secret(path: Path) -> str:
    """The line of a file that only its owner can read.

    Raises:
        InputError: if there is no such file, or it does not hold one line.
        ConfigError: if others may read it.
    """
    try:
        with path.open() as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            lines = handle.read(8192).split()
    except OSError as error:
        raise InputError(f"{path}: cannot read the URL of the study database ({error.strerror})") from error
    if mode & 0o077:
        raise ConfigError(f"{path}: its mode is {mode:04o}, so others can read the password in it; run chmod 600 on it")
    if len(lines) != 1:
        raise InputError(f"{path}: holds {len(lines)} words, expected one line with the URL of a database")
    return lines[0]


def new_password() -> str:
    """256 random bits, in characters that need no escaping in a URL."""
    return secrets.token_urlsafe(32)


def scram_verifier(password: str) -> str:
    """What PostgreSQL stores of an ASCII password (RFC 5803), so that the password itself is never in any SQL."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _ITERATIONS)
    client = hmac.digest(salted, b"Client Key", "sha256")
    server = hmac.digest(salted, b"Server Key", "sha256")
    parts = [base64.b64encode(part).decode() for part in (salt, hashlib.sha256(client).digest(), server)]
    return f"SCRAM-SHA-256${_ITERATIONS}:{parts[0]}${parts[1]}:{parts[2]}"
