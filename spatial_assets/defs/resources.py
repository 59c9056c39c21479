"""What assets and sensors are given: the settings, and the means to run a stage. Nothing is read at import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from spatial_assets.compute.base import Outcome, Work
from spatial_assets.compute.choose import choose_runner
from spatial_core.config.settings import Settings, load_settings


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

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        """Run the stage calls of an asset; their log lines go to the run of `context`.

        Yields:
            One outcome for each call, as it is known.
        """
        if work.calls:
            yield from choose_runner(work).run_all(context, work)


@dg.definitions
def resources() -> dg.Definitions:
    """Resources of the code location; light work runs in the run's own process."""
    return dg.Definitions(
        resources={"settings": SettingsResource(), "compute": ComputeResource()},
        executor=dg.in_process_executor,
    )
