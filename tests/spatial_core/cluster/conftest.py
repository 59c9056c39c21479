"""SLURM's commands played by small shell scripts, for what a real cluster does not do on request."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

COMMANDS = ("sbatch", "squeue", "sacct", "scancel")
# Notes its arguments and environment, then does as it was told for all calls, or for the call with this number.
SCRIPT = """#!/bin/sh
here={folder}
count=$(ls "$here" | grep -c '^{name}[.]args[.]')
for word in "$@"; do printf '%s\\n' "$word"; done > "$here/{name}.args.$count"
env > "$here/{name}.env"
said="$here/{name}"
[ -e "$said.$count" ] && said="$said.$count"
[ -e "$said" ] && . "$said"
exit 0
"""


class FakeCommands:
    """Commands on PATH that say what they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in COMMANDS:
            program = self.bin / name
            program.write_text(SCRIPT.format(folder=folder, name=name))
            program.chmod(0o755)

    def say(self, name: str, out: str = "", *, err: str = "", code: int = 0, call: int | None = None) -> None:
        """What a command prints and how it ends, at every call or at the one with a number (from 0)."""
        text = self.folder / f"{name}.text{'' if call is None else call}"
        text.write_text(out)
        place = self.folder / (name if call is None else f"{name}.{call}")
        place.write_text(f"cat {text}\n" + (f"echo '{err}' >&2\n" if err else "") + f"exit {code}\n")

    def hang(self, name: str) -> None:
        """Never answer."""
        (self.folder / name).write_text("exec sleep 60\n")

    def calls(self, name: str) -> list[list[str]]:
        """Arguments of every call."""
        files = sorted(self.folder.glob(f"{name}.args.*"), key=lambda file: int(file.suffix[1:]))
        return [file.read_text().splitlines() for file in files]

    def environment(self, name: str) -> str:
        """Environment of the last call."""
        return (self.folder / f"{name}.env").read_text()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fake = FakeCommands(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    return fake
