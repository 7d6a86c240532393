"""No secret is left in a text, whole or in part, and the rest of the text stays readable."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e import command, profile_data

from servebench.engine.redaction import Redaction

TOKEN = "eyJhbGciOi.J9"


@pytest.mark.parametrize(
    ("values", "text", "left"),
    [
        pytest.param([f"Bearer {TOKEN}"], f"bad header: Bearer {TOKEN}!", "bad header: <redacted>!", id="the value"),
        pytest.param([f"Bearer {TOKEN}"], f"bad token x{TOKEN}x", "bad token x<redacted>x", id="the token alone"),
        pytest.param(["a (very) [odd] v*lue"], "a (very) [odd] v*lue.", "<redacted>.", id="signs of patterns"),
        pytest.param(["two  spaces"], "'two spaces'", "'<redacted>'", id="spaces that were folded"),
        pytest.param([TOKEN, TOKEN + "-longer"], f"{TOKEN}-longer", "<redacted>", id="one is the beginning of another"),
        pytest.param([TOKEN], f"{TOKEN} {TOKEN}", "<redacted> <redacted>", id="twice"),
        pytest.param([f"Bearer {TOKEN}"], f"user of {TOKEN[:6]}…", "user of <redacted>", id="cut within it"),
        pytest.param([TOKEN], f"not a reply: b'{TOKEN[:9]}'", "not a reply: b'<redacted>", id="cut and quoted"),
        pytest.param(["1"], "HTTP 501: level 1 of 11", "HTTP 501: level <redacted> of 11", id="short"),
        pytest.param([""], "HTTP 501: nothing", "HTTP 501: nothing", id="an empty value"),
        pytest.param([], "HTTP 501: nothing", "HTTP 501: nothing", id="no secrets"),
        pytest.param([TOKEN], "the end", "the end", id="another text"),
    ],
)
def test_secrets_are_replaced(values: list[str], text: str, left: str) -> None:
    assert Redaction(values)(text) == left


@contextlib.contextmanager
def echoing_server(status: int) -> Iterator[str]:
    """A model server that quotes the Authorization header in its answer to every query."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def answer(self, status: int, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

        def do_GET(self) -> None:
            tensor = {"datatype": "FP32", "shape": [3]}
            self.answer(200, {"name": "m", "inputs": [{"name": "X", **tensor}], "outputs": [{"name": "Y", **tensor}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(status, {"error": f"no such user: {self.headers['Authorization']}, nor {self.headers['X-Key']}"})

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.load
@pytest.mark.parametrize(
    ("protocol", "status"),
    [
        pytest.param("kserve-http", 403, id="refused"),
        pytest.param("kserve-http", 200, id="an error in a success"),
        pytest.param("torchserve-http", 403, id="refused before the run"),
    ],
)
def test_what_a_server_quotes_of_the_headers_stays_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, status: int
) -> None:
    monkeypatch.setenv("SB_TOKEN", "tok-5f3a9c")
    with echoing_server(status) as url:
        data_of = profile_data(
            url, constraints=["p99 <= 500ms"], load={"target_qps": 50, "min_duration_s": 0, "min_query_count": 20}
        )
        data_of["endpoint"] |= {"protocol": protocol, "bearer_token_env": "SB_TOKEN", "headers": {"X-Key": "key with  9 lives"}}
        if protocol == "torchserve-http":
            (tmp_path / "bodies").mkdir()
            (tmp_path / "bodies" / "one.json").write_text("[1]")
            data_of["samples"] = {"source": "files", "path": str(tmp_path / "bodies")}
        (tmp_path / "profile.yaml").write_text(json.dumps(data_of))  # JSON is YAML
        done = command("run", "profile.yaml", "--out", "run", "--json", cwd=tmp_path)
    said = "no such user: <redacted>, nor <redacted>"
    if protocol == "torchserve-http":
        assert done.returncode == 1 and f"refuses the first sample: HTTP 403: {said}" in done.stderr, done.stderr
    else:
        assert said in json.loads(done.stdout)["errors"][0]["detail"], done.stderr
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    for secret in ("tok-5f3a9c", "9 lives"):
        assert secret not in done.stdout + done.stderr
        assert not [content for content in written if secret.encode() in content]
