"""`spatial cluster check`: proves a cluster profile before anything is submitted."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from spatial_core.cli.app import app
from spatial_core.cli.session import STDERR, STDOUT, ConfigOption, JsonOption, SetOption, read_settings
from spatial_core.cluster.check import ClusterCheck
from spatial_core.cluster.finding import Finding
from spatial_core.cluster.resources import resources_for
from spatial_core.cluster.script import Submission, render
from spatial_core.cluster.transport import transport_for
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterUnreachable
from spatial_core.lake.catalogue import CATALOGUE

cluster = typer.Typer(no_args_is_help=True, help="The cluster that the settings name: whether it works, what it cost.")
app.add_typer(cluster, name="cluster")


@cluster.command("check")
def check(
    build: Annotated[bool, typer.Option("--build", help="Build the managed environment if it is missing.")] = False,
    wait: Annotated[float, typer.Option(min=1, help="Seconds that test jobs may take to start and end.")] = 180.0,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Prove that jobs will run as the settings say, and say what to do where they would not.

    Logs in, asks the scheduler for everything the settings name, lets sbatch judge the job of every asset, and sends
    one short test job to each partition, which tries folders, scratch and Python environment on a node. Nothing is
    left behind. The exit code is 1 when a step failed.
    """
    settings = read_settings(config, set_)
    if settings.compute.profile == "local":
        if json_:
            sys.stdout.write(json.dumps({"profile": "local", "ok": True, "findings": []}) + "\n")
        else:
            STDOUT.print("compute.profile is local: stages run on this machine, there is nothing to check")
        return
    findings = []
    with closing(_findings(settings, build, wait)) as found:
        for finding in found:
            findings.append(finding)
            if not json_:
                _show(finding)
    failed = [finding for finding in findings if not finding.ok]
    if json_:
        listed = [{**asdict(finding), "ok": finding.ok} for finding in findings]
        record = {"profile": settings.compute.profile, "ok": not failed, "findings": listed}
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    elif failed:
        STDOUT.print(f"{len(failed)} of {len(findings)} steps failed", style="red")
    else:
        STDOUT.print(f"all {len(findings)} steps are as jobs need them", style="green")
    if failed:
        raise typer.Exit(1)


def submissions(settings: Settings) -> dict[str, Submission]:
    """What would be submitted for two partition keys, or the one artifact, of every asset made on the cluster."""
    rendered = {}
    for asset, kind in CATALOGUE.items():
        if kind.stage and not kind.here and asset not in settings.compute.local_assets:
            calls = {key: kind.call(settings, key) for key in (("0000", "0001") if kind.partition else ("",))}
            rendered[asset] = render(
                asset, calls, resources_for(settings.compute, asset), settings,
                name=f"spatial-{asset.replace('_', '-')}-CHECKED", python=Path("python3"), run_id="CHECK",
            )  # fmt: skip
    return rendered


def _findings(settings: Settings, build: bool, wait: float) -> Generator[Finding]:
    def say(text: str) -> None:
        STDERR.print(text, soft_wrap=True)

    checked = ClusterCheck(settings, transport_for(settings), submissions(settings), build=build, wait_s=wait, say=say)
    try:
        yield from checked.run()
    except ClusterUnreachable as error:
        yield Finding("connection", f"lost on the way: {error}", "run the check again; what it had sent ends by itself")


def _show(finding: Finding) -> None:
    mark = ("ok    ", "green") if finding.ok else ("failed", "red")
    STDOUT.print(Text.assemble(mark, " ", (finding.step, "bold"), f": {finding.text}"), soft_wrap=True)
    if finding.remedy:
        STDOUT.print(f"       -> {finding.remedy}", soft_wrap=True)
