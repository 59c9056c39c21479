"""The retrieval report over HTTP on the loopback interface: what a link in another web page can point to.

Browsers follow no link from a page to a file, and the report may lie on another machine, which a forwarded port
reaches. The folder is looked up at every request, so a report that is made again shows at the next reload.
"""

from __future__ import annotations

import logging
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from spatial_core.errors import ConfigError

HOST: Final = "127.0.0.1"
_TYPES: Final = {
    "report.html": "text/html; charset=utf-8",
    "metrics.json": "application/json",
    "summary.png": "image/png",
    "summary.md": "text/markdown; charset=utf-8",
}
_LOG = logging.getLogger(__name__)


def report_url(port: int) -> str:
    """Where `report_server` shows the page."""
    return f"http://{HOST}:{port}/"


def report_server(report_dir: Path, port: int) -> ThreadingHTTPServer:
    """A server of the report's files, bound but not running yet; `serve_forever` runs it.

    Args:
        report_dir: folder of `evaluate`; it need not be there yet.
        port: on the loopback interface; 0 for any that is free.

    Raises:
        ConfigError: if the port is taken.
    """
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, report_dir))
    except OSError as error:
        raise ConfigError(
            f"port {port} of {HOST} cannot be used ({error.strerror}); name another with --port or logging.report_port"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, report_dir: Path, *args: Any) -> None:
        self._report_dir = report_dir
        super().__init__(*args)

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/") or "report.html"
        file = self._report_dir / name
        if name not in _TYPES:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is no such page\n")
        elif not file.is_file():
            text = (
                f"There is no {name} in {self._report_dir} yet: materialize retrieval_report or run spatial evaluate.\n"
            )
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", text.encode())
        else:
            self._answer(HTTPStatus.OK, _TYPES[name], file.read_bytes())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name the base class uses
        _LOG.debug(format, *args)
