"""The `compute` section: what is accepted for a job script or a scheduler's command line, and what never gets there."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import ConfigError

EVIL = ("", " ", "-x", "a b", "a\n", "$(x)", "`x`", "a;b", "a|b", 'a"b', "a'b", "a\\b", "*", "a/b", "x" * 201)


def load(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load_settings(file, environ={})


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("time_limit = 04:00:00", "time_limit", "04:00:00"),
        ("time_limit = 90", "time_limit", "90"),
        ("time_limit = 1440", "time_limit", "1440"),
        ('time_limit = "48:00:00"', "time_limit", "48:00:00"),
        ('time_limit = "2-12"', "time_limit", "2-12"),
        ('time_limit = "2-12:30:00"', "time_limit", "2-12:30:00"),
        ("mem = 4096", "mem", "4096"),
        ('mem = "48G"', "mem", "48G"),
        ("gpus = 2", "gpus", "2"),
        ("gpus = 0", "gpus", "0"),
        ('gpus = "nvidia_h100_80gb_hbm3_3g.40gb:1"', "gpus", "nvidia_h100_80gb_hbm3_3g.40gb:1"),
        ('constraint = "[rack1|rack2]&ib"', "constraint", "[rack1|rack2]&ib"),
        ('partition = "gpu,gpu-long"', "partition", "gpu,gpu-long"),
        ('account = "def-prof_gpu"', "account", "def-prof_gpu"),
        ('extra = ["--exclusive", "--mail-user=me@site.org", "--licenses=a:2"]', "extra", None),
    ],
)
def test_what_sbatch_understands_is_taken_as_written(line: str, key: str, value: str | None, tmp_path: Path) -> None:
    settings = load(tmp_path, f"[compute.resources.merged_splits]\n{line}\n")
    given = settings.compute.resources["merged_splits"]
    assert given.model_dump(exclude_none=True).keys() == {key}
    if value is not None:
        assert getattr(given, key) == value
    assert Settings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize("key", ["partition", "account", "qos"])
@pytest.mark.parametrize("value", EVIL)
def test_names_with_other_characters_are_refused_everywhere(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=key):
        Settings(compute={"resources": {"merged_splits": {key: value}}})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=key):
        Settings(compute={key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["ssh_host", "ssh_user", "ssh_jump_host"])
@pytest.mark.parametrize("value", ["-oProxyCommand=x", "a b", "host;x", "$(x)", "host\n", ""])
def test_ssh_places_cannot_be_options_or_commands(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=key):
        Settings(compute={"ssh_host": "login", key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("mem", ("0", "48GB", "4.5G", "-1", "4G\n", "$(x)", True, "1e3")),
        ("time_limit", ("4h", "1:2", "01:00:00:00", "-1", "$(x)", "1-", "10\n", "04:00:00.5")),
        ("gpus", ("-1", "a100", "a100:0", "a:b:1", "2 ", "$(x):1")),
        ("constraint", ("a b", "$(x)", "a\n", ";")),
        ("cpus", (0, -1, 1.5)),
        ("nodes", (0,)),
        ("max_parallel", (0,)),
    ],
)
def test_amounts_that_are_none_are_refused(key: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=key):
            Settings(compute={"resources": {"merged_splits": {key: value}}})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option",
    [
        "--array=0-5", "--arr=0-5", "--export=NONE", "--exp=NONE", "--chdir=/", "--output=/x", "--outp=/x",
        "--wrap=true", "--requeue", "--no-requeue", "--signal=KILL",
        "--uid=0", "--gid=0", "--get-user-env", "--parsable", "--help", "--clusters=all", "--wait", "--test-only",
        "--mem=900G", "--time=1", "--part=gpu", "--nodes=3",
    ],
)  # fmt: skip
def test_options_that_would_hide_a_job_are_refused_also_abbreviated(option: str) -> None:
    with pytest.raises(ValueError, match="set by the platform"):
        Settings(compute={"resources": {"merged_splits": {"extra": [option]}}})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["-p gpu", "exclusive", "--a b", "--x=$(x)", "--x=a;b", "--x\n", "--X=1", "--x='a'"])
def test_what_is_not_an_option_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match="extra"):
        Settings(compute={"resources": {"merged_splits": {"extra": [option]}}})  # type: ignore[arg-type]


def test_an_unknown_key_of_an_asset_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean compute\.resources\.merged_splits\.time_limit\?"):
        load(tmp_path, "[compute.resources.merged_splits]\ntimelimit = 90\n")


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"slurm_ssh needs compute\.ssh_host"):
        load(tmp_path, '[compute]\nprofile = "slurm_ssh"\n')
    with pytest.raises(ConfigError, match="poll_max_s 2 is below poll_s 3"):
        load(tmp_path, "[compute]\npoll_s = 3\npoll_max_s = 2\n")


def test_a_password_is_not_sent_to_a_cluster() -> None:
    uri = {"mlflow_tracking_uri": "https://me:secret@mlflow.example.org"}
    assert Settings(logging=uri).logging.mlflow_tracking_uri  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_PASSWORD on the nodes") as caught:
        Settings(logging=uri, compute={"profile": "slurm_login"})  # type: ignore[arg-type]
    assert "logging.mlflow_tracking_uri holds a password" in str(caught.value)
