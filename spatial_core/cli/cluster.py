"""Commands about a SLURM cluster: what would be submitted."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Annotated

import typer

from spatial_core.cli.app import app
from spatial_core.cli.session import STDOUT, ConfigOption, JsonOption, SetOption, note, read_settings
from spatial_core.cluster.environment import node_python
from spatial_core.cluster.resources import resources_for
from spatial_core.cluster.script import Submission, render
from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError
from spatial_core.lake.catalogue import CATALOGUE, known_keys

slurm = typer.Typer(no_args_is_help=True, help="What goes to a SLURM cluster.")
app.add_typer(slurm, name="slurm")


@slurm.command("render")
def render_asset(
    asset: Annotated[str, typer.Argument(help="Asset, as in `spatial status`.", show_default=False)],
    partition: Annotated[
        list[str] | None, typer.Option("--partition", "-p", help="Partition key; may be given several times.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Print the exact sbatch command, script and task files that materializing would submit. Submits nothing."""
    settings = read_settings(config, set_)
    shown = rendered(settings, asset, partition or [])
    if unknown := set(partition or ()) - set(known_keys(settings, CATALOGUE[asset].partition or "tar")):
        note(f"not there yet: {', '.join(sorted(unknown))}")
    if json_:
        sys.stdout.write(json.dumps(shown.request() | {"name": shown.name}, indent=2) + "\n")
        return
    for title, text in _parts(shown):
        STDOUT.rule(title, align="left")
        sys.stdout.write(text.rstrip() + "\n")


def rendered(settings: Settings, asset: str, keys: list[str]) -> Submission:
    """The submission of an asset's partitions; all known ones when none are named.

    Raises:
        ConfigError: if the asset does not exist, is not made by a stage, or the keys do not fit it.
    """
    kind = CATALOGUE.get(asset)
    if kind is None or not kind.stage:
        raise ConfigError(
            f"no stage makes {asset!r}; there are {', '.join(n for n, k in CATALOGUE.items() if k.stage)}"
        )
    if kind.here:
        raise ConfigError(f"{asset} is made on this machine, whatever compute.profile says; nothing is submitted")
    if kind.partition is None and keys:
        raise ConfigError(f"{asset} has no partitions, so --partition {keys[0]} names nothing")
    if kind.partition is not None and not keys:
        keys = known_keys(settings, kind.partition)
        if not keys:
            raise ConfigError(f"no {kind.partition} is known yet; name one with --partition")
    if "" in keys:
        raise ConfigError(f"{asset} has a partition key, so --partition must not be empty")
    calls = {key: kind.call(settings, key) for key in keys or [""]}
    resources = resources_for(settings.compute, asset)
    return render(
        asset, calls, resources, settings,
        name=f"spatial-{asset.replace('_', '-')}-RENDERED", python=node_python(settings), run_id="RUN",
    )  # fmt: skip


def _parts(submission: Submission) -> list[tuple[str, str]]:
    command = shlex.join(["sbatch", "--parsable", *submission.options, f"{submission.folder}/job.sh"])
    return [("command", command), *submission.files.items()]
