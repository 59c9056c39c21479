"""The command line as a user meets it: help, exit codes, one-line causes, JSON on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from spatial_core.cli.views import sql
from tests.data.make_tars import street_view, tar_bytes

COMMANDS = (
    "ingest", "fingerprint", "embed", "merge", "difficulty", "train", "evaluate", "publish", "embed-new",
    "pool-buildings", "demo-data", "tune", "tune-worker", "tune-collect", "status", "sql", "verify", "settings",
    "stats", "report", "slurm",
)  # fmt: skip
STAGES = COMMANDS[:14]


def spatial(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spatial_core.cli.main", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = spatial("--help", cwd=tmp_path)
    assert shown.returncode == 0
    places = [shown.stdout.find(f"\u2502 {command} ") for command in COMMANDS]
    assert min(places) > 0
    assert places == sorted(places), "stages in the order of the chain, then what looks around"


@pytest.mark.parametrize("command", STAGES)
def test_every_stage_takes_the_common_options(command: str, tmp_path: Path) -> None:
    shown = spatial(command, "--help", cwd=tmp_path).stdout
    for option in ("--output", "--config", "--set", "--json"):
        assert option in shown, f"{command} lacks {option}"


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (["ingest"], 2, "Missing argument"),
        (["ingest", "0901.tar"], 2, "--output"),
        (["ingest", "0901.tar", "--output", "out", "--wrong"], 2, "No such option"),
        (["ingest", "0901.tar", "--output", "out", "--set", "training.marign=1"], 2, "did you mean training.margin?"),
        (["ingest", "0901.tar", "--output", "out", "--config", "none.toml"], 2, "none.toml: no such file"),
        (["ingest", "0901.tar", "--output", "out"], 1, "0901.tar"),
        (["merge", "--embeddings", "none", "--output", "out"], 1, "none"),
        (["sql", "select * from train"], 1, "views made so far"),
        (["sql", "select 1", "--format", "parquet"], 2, "--output"),
        (["sql", "select 1", "--output", "out.txt"], 2, "written as .csv or .parquet"),
        (["ingest", "0901.tar", "--output", "out.csv"], 2, "this command writes a folder"),
        (["embed-new", "march.parquet", "--output", "out.csv"], 2, "this command writes a folder"),
        (["evaluate", "--merged", "m", "--checkpoint", "c", "--output", "report.html"], 2, "writes a folder"),
        (["difficulty", "--fingerprints", "f", "--output", "out"], 2, "let its name end in .parquet"),
        (["difficulty", "--fingerprints", "f", "--output", "."], 2, "is a folder"),
        (["pool-buildings", "--embeddings", "e", "--output", "out.csv"], 2, "let its name end in .parquet"),
        (["merge", "--embeddings", "e", "--output", "."], 2, "the working folder lies there"),
        (["evaluate", "--merged", "m", "--checkpoint", "c", "--output", "."], 2, "the working folder lies there"),
        (["publish", "--checkpoint", "c", "--output", ".."], 2, "the working folder lies there"),
        (["embed-new", "march.parquet", "--output", "."], 2, "the working folder lies there"),
        (["ingest", "0901.tar", "--output", "."], 1, "0901.tar"),
        (["verify", "none"], 1, "none"),
    ],
)
def test_failures_are_one_line_with_their_code(arguments: list[str], code: int, cause: str, tmp_path: Path) -> None:
    failed = spatial(*arguments, cwd=tmp_path)
    assert failed.returncode == code, failed.stderr
    assert cause in failed.stderr
    assert "Traceback" not in failed.stderr
    if failed.stderr.startswith("error:"):
        assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""
    assert not list(tmp_path.iterdir())


def test_settings_and_status_as_json(tmp_path: Path) -> None:
    shown = spatial("settings", "--json", "--set", "training.margin=0.25", cwd=tmp_path)
    record = json.loads(shown.stdout)
    assert record["settings"]["training"]["margin"] == 0.25
    assert len(record["digest"]) == 64
    assert {row["state"] for row in json.loads(spatial("status", "--json", cwd=tmp_path).stdout)} == {
        "missing",
        "on demand",
    }


def test_sql_prints_tables_and_csv(tmp_path: Path) -> None:
    assert spatial("sql", "select 1 as a, 'x,y' as b", "--format", "csv", cwd=tmp_path).stdout == 'a,b\n1,"x,y"\n'
    assert "answer" in spatial("sql", "select 42 as answer", cwd=tmp_path).stdout


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    """Brackets are no markup and colons no emoji, wherever a text comes from."""
    texts = ["[i]", ":smile:", "[/x]", "a[red]b", "[a-z][a-z-]"]
    columns = ", ".join(f"'{text}' as \"{text}:8:\"" for text in texts)
    shown = spatial("sql", f"select {columns}", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for text in texts:
        assert text in shown.stdout.splitlines()[3], "in a cell"
        assert f"{text}:8:" in shown.stdout.splitlines()[1], "in a heading"
        failed = spatial("verify", f"x{text}y", cwd=tmp_path)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error:")
        assert f"x{text}y" in failed.stderr


def test_an_artifact_in_a_folder_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "a[red]b").mkdir()
    (tmp_path / "a[red]b/0901.tar").write_bytes(tar_bytes(street_view(901, seed=1)))
    made = spatial("ingest", "a[red]b/0901.tar", "--output", "a[/x]b/:o:", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "a[/x]b/:o:/0901.parquet" in made.stdout.replace("\n", "")
    written = spatial("sql", "select 1", "--output", "a[red]b/[i].csv", cwd=tmp_path)
    assert "1 rows written to a[red]b/[i].csv" in written.stderr


def test_the_query_that_help_names_can_be_run(tmp_path: Path) -> None:
    (tmp_path / "0901.tar").write_bytes(tar_bytes(street_view(901, seed=1)))
    spatial("ingest", "0901.tar", "--output", "data/intermediates", cwd=tmp_path)
    argument = get_type_hints(sql, include_extras=True)["query"].__metadata__[0]
    query = argument.help.partition("try: ")[2]
    shown = spatial("sql", query, "--format", "csv", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "ingest,1" in shown.stdout


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["stats"], ["sql", "select 1"]])
def test_looking_at_the_lake_of_the_defaults_is_said(command: list[str], tmp_path: Path) -> None:
    shown = spatial(*command, cwd=tmp_path)
    assert shown.stderr.startswith("note: no settings file: ")
    assert shown.stderr.count("\n") == 1
    assert str(tmp_path / "data") in shown.stderr
    assert "note" not in shown.stdout
    (tmp_path / "config.toml").touch()
    assert spatial(*command, cwd=tmp_path).stderr == ""
    (tmp_path / "config.toml").rename(tmp_path / "other.toml")
    assert spatial(*command, "--config", "other.toml", cwd=tmp_path).stderr == ""


def test_tables_are_in_full_where_a_program_reads_them(tmp_path: Path) -> None:
    shown = spatial("stats", cwd=tmp_path).stdout
    for heading in ("per building", "repeated", "rejected"):
        assert heading in shown
