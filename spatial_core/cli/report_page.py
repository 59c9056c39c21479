"""`spatial report`: the retrieval report in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from spatial_core.cli.app import app
from spatial_core.cli.session import STDOUT, ConfigOption, SetOption, read_settings
from spatial_core.evaluation.serving import report_server, report_url


@app.command()
def report(
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port on 127.0.0.1. Default: logging.report_port.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Show the retrieval report on http://127.0.0.1:3001 until interrupted; the link in Dagster points there.

    `make dev` runs this beside Dagster. For a report on another machine, forward the port: ssh -L 3001:127.0.0.1:3001.
    """
    settings = read_settings(config, set_)
    folder = settings.locations.report_dir
    with report_server(folder, settings.logging.report_port if port is None else port) as server:
        STDOUT.print(f"{report_url(server.server_port)} shows {folder / 'report.html'}; Ctrl-C ends", soft_wrap=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            STDOUT.print("ended")
