"""The report over HTTP: the page as it is now, nothing else, on the loopback interface only."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spatial_core.errors import ConfigError
from spatial_core.evaluation.serving import report_server, report_url


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with report_server(tmp_path / "report", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def get(port: int, path: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    found = (answer.status, answer.headers["Content-Type"], answer.read())
    connection.close()
    return found


def test_the_page_is_the_one_that_lies_there_now(tmp_path: Path, port: int) -> None:
    status, _, text = get(port, "/")
    assert status == 404 and b"spatial evaluate" in text
    folder = tmp_path / "report"
    for content in (b"<html>one</html>", b"<html>two</html>"):
        folder.mkdir(exist_ok=True)
        (folder / "report.html").write_bytes(content)
        for path in ("/", "/report.html", "/?again"):
            assert get(port, path) == (200, "text/html; charset=utf-8", content)
        folder.rename(tmp_path / f"old_{len(list(tmp_path.iterdir()))}")


@pytest.mark.parametrize("path", ["/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "//etc/passwd", "/.."])
def test_nothing_else_is_shown(tmp_path: Path, port: int, path: str) -> None:
    (tmp_path / "report").mkdir()
    for place in (tmp_path, tmp_path / "report"):
        (place / "secret.txt").write_text("secret")
    status, _, text = get(port, path)
    assert status == 404
    assert b"secret" not in text


def test_a_port_that_is_taken_is_named(tmp_path: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=rf"port {port} .*--port or logging\.report_port"):
        report_server(tmp_path, port)
    assert report_url(port) == f"http://127.0.0.1:{port}/"
