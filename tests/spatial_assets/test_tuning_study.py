"""The tuning study through Dagster: real workers on a real PostgreSQL, and training that takes its advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource
from tests.data.make_training_lake import build_lake


@pytest.fixture
def tuned(lake, tmp_path: Path) -> Any:
    """A lake of splits and difficulty, and settings of a short study of two workers."""
    made = build_lake(tmp_path / "made")

    def write(**tuning: Any) -> None:
        lake.write(
            training={"num_epochs": 2, "batch_size": 16, "ucb_warmup_samples": 50},
            training_model={"hidden_dim": 16, "output_dim": 8},
            infrastructure={"device": "cpu"},
            tuning={
                "trials": 3,
                "workers": 2,
                "max_epochs": 2,
                "metric": "recall@1",
                "heartbeat_s": 1,
                "grace_s": 3,
                "space": {},
                **tuning,
            },
        )
        text = lake.config.read_text().replace("space = {}", "space = {hidden_dim = [12, 20], batch_size = [8]}")
        paths = f"merged_dir = '{made.merged}'\ndifficulty_metadata_path = '{made.difficulty}'\n"
        lake.config.write_text(text.replace('data_dir = "data"\n', f'data_dir = "data"\n{paths}'))

    write()
    lake.rewrite = write
    return lake


def materialize(lake, instance, asset: str, *, succeeds: bool = True) -> dg.ExecuteInProcessResult:
    definitions = definitions_with(settings=SettingsResource(config_file=str(lake.config)))
    result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey(asset)], raise_on_error=False
    )
    assert result.success is succeeds
    return result


def metadata(instance, asset: str) -> dict[str, Any]:
    found = instance.fetch_materializations(dg.AssetKey(asset), limit=1).records[0].asset_materialization
    assert found is not None
    return {name: value.value for name, value in found.metadata.items()}


def test_a_study_is_made_shown_and_followed(tuned, instance, capfd: pytest.CaptureFixture[str]) -> None:
    materialize(tuned, instance, "projector_checkpoint")
    assert metadata(instance, "projector_checkpoint")["hyper_parameters"] == (
        "of the settings: there is no tuning study"
    )
    result = materialize(tuned, instance, "tuning_study")
    at = tuned.settings.locations
    url = (at.tuning_dir / "storage.url").read_text().strip()
    password = url.partition("@")[0].rpartition(":")[2]
    assert len(password) > 30
    written = capfd.readouterr()
    events = "".join(str(entry) for entry in instance.all_logs(result.run_id))
    assert "tuning_study worker 01: done" in events
    assert password not in events + written.out + written.err
    record = json.loads((at.tuning_dir / "study.json").read_text())
    assert {trial["worker"] for trial in record["trials"]} == {"00", "01"}
    assert len(record["trials"]) == 3
    shown = metadata(instance, "tuning_study")
    assert shown["dagster/row_count"] == 3
    assert shown["best_value"] == record["best"]["value"]
    assert shown["best_trials"].startswith("| trial | recall@1 | epoch | activation |")
    assert shown["best_trials"].count("\n") == 1 + 3
    assert shown["history"].startswith("![objective by trial](data:image/svg+xml;base64,")
    assert shown["page_url"] == (at.tuning_dir / "study.html").as_uri()
    (check,) = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("tuning_study"), "study_sound"), limit=5
    )
    assert check.status.value == "SUCCEEDED"

    materialize(tuned, instance, "projector_checkpoint")
    taken = metadata(instance, "projector_checkpoint")
    best = record["best"]
    assert taken["hyper_parameters"].startswith(f"of trial {best['number']} of study {record['study']} (recall@1 ")
    assert taken["hyper_parameters"].endswith("on these inputs)")
    assert f"| training_model.hidden_dim | {best['parameters']['hidden_dim']} |" in taken["tuned"]
    assert taken["details"]["projector"]["hidden_widths"][0] == best["parameters"]["hidden_dim"]

    before = (at.tuning_dir / "study.json").read_bytes()
    materialize(tuned, instance, "tuning_study")
    assert metadata(instance, "tuning_study")["up_to_date"] is True
    assert (at.tuning_dir / "study.json").read_bytes() == before


def test_a_failed_study_says_why_in_one_line(tuned, instance) -> None:
    tuned.rewrite(metric="loss")
    result = materialize(tuned, instance, "tuning_study", succeeds=False)
    (event,) = [event for event in result.all_events if event.is_step_failure]
    assert event.step_failure_data.user_failure_data.description == (
        "ConfigError: tuning.metric is 'loss'; it must be recall@k, as in recall@100"
    )


def test_workers_that_fail_are_named(tuned, instance) -> None:
    text = tuned.config.read_text().replace("hidden_dim = [12, 20]", 'activation = ["tanh"]')
    tuned.config.write_text(text)
    result = materialize(tuned, instance, "tuning_study", succeeds=False)
    (event,) = [event for event in result.all_events if event.is_step_failure]
    line = event.step_failure_data.user_failure_data.description
    assert line.startswith("StageFailed: study projector-")
    assert "worker 00: ConfigError: training_model.activation" in line
    assert "\n" not in line
