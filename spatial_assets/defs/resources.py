"""What assets and sensors are given: the settings, and the means to run a stage. Nothing is read at import."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from spatial_assets.compute import choose_runner
from spatial_core.config.settings import Settings, load_settings
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report


class SettingsResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The settings tree, read anew whenever it is used, so that an edited file counts from the next run on.

    Args:
        config_file: TOML file; empty = the one named by SPATIAL_CONFIG, else `config.toml` of the working folder.
    """

    config_file: str = ""

    def load(self) -> Settings:
        """Read the settings.

        Raises:
            ConfigError: one line naming file, key and cause.
        """
        return load_settings(Path(self.config_file) if self.config_file else None)


class ComputeResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Runs stages where `compute` in the settings says."""

    def run(self, context: dg.AssetExecutionContext, call: StageCall, key: str = "") -> Report:
        """Run a stage to its end.

        Args:
            context: of the asset that asks; log lines go to its run.
            call: the stage and its arguments.
            key: partition key the call is for, empty for an asset without partitions.

        Raises:
            SpatialError: what the stage raised.
        """
        return choose_runner(call).run(context, call)


@dg.definitions
def resources() -> dg.Definitions:
    """Resources of the code location; light work runs in the run's own process."""
    return dg.Definitions(
        resources={"settings": SettingsResource(), "compute": ComputeResource()},
        executor=dg.in_process_executor,
    )
