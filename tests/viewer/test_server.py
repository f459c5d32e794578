"""The server: it answers this machine's own pages, and nobody and nothing else."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys

import pytest

from ksparse.errors import InputError

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from ksparse.viewer import server  # noqa: E402

from .conftest import N, TOKEN, serving  # noqa: E402


def ask(port: int, path: str, *, method: str = "GET", body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Send one request with the token, and else exactly these headers and this path; a header of '' is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    data = json.dumps(body).encode() if not isinstance(body, (bytes, type(None))) else body
    given = {"Host": f"127.0.0.1:{port}", "Authorization": f"Bearer {TOKEN}"} | ({"Content-Type": "application/json", "Content-Length": str(len(data))} if data is not None else {})
    for name, value in (given | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(data)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_pages_and_pieces_are_served(served):
    status, headers, page = ask(served, "/")
    assert status == 200 and b"data-live" in page and headers["content-type"].startswith("text/html")
    status, headers, body = ask(served, "/data/overview.json")
    assert status == 200 and json.loads(body)["n"] == N and json.loads(body)["live"] is True
    assert ask(served, "/report.html")[0] == 200 and ask(served, "/viewer.css")[0] == 200


def test_only_this_machine_listens(served):
    with server.listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    own = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1", "127.0.1.1"}
    for address in own:
        with pytest.raises(OSError):
            socket.create_connection((address, served), timeout=2).close()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "localhost.evil.example:8765", "evil@127.0.0.1", "127.0.0.1:x",
                                  "0.0.0.0", "[::1", "127.0.0.1/"])
def test_a_foreign_host_is_refused(served, host):
    for path in ("/", "/data/overview.json", "/nothing"):
        status, _, body = ask(served, path, Host=host)
        assert status in (400, 403) and b"latents" not in body, (path, body)


def test_localhost_is_this_machine(served):
    assert ask(served, "/", Host=f"localhost:{served}")[0] == 200
    assert ask(served, "/", Host="LOCALHOST:9999")[0] == 200  # a forwarded port


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1", "http://localhost:{port}", "file://"])
def test_a_foreign_origin_is_refused(served, trained, origin):
    origin = origin.format(port=served)
    assert ask(served, "/data/overview.json", Origin=origin)[0] == 403
    assert ask(served, "/api/label", method="POST", body={"latent": 1, "label": "x", "star": True}, Origin=origin)[0] == 403
    assert not (trained.path / "labels.json").exists()


def test_our_own_origin_is_answered(served):
    assert ask(served, "/data/overview.json", Origin=f"http://127.0.0.1:{served}", Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_here_but_not_load(served, site):
    assert ask(served, "/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document")[0] == 200
    for mode, dest in (("no-cors", "script"), ("no-cors", "image"), ("cors", "empty"), ("navigate", "iframe")):
        assert ask(served, "/data/overview.json", Sec_Fetch_Site=site, Sec_Fetch_Mode=mode, Sec_Fetch_Dest=dest)[0] == 403


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/../../../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/etc/passwd",
                                  "/data/../../recipe.toml", "/data/../recipe.toml.json", "/data/%2e%2e%2frecipe.json", "/data//etc/passwd.json", "/recipe.toml",
                                  "/labels.json", "/checkpoints", "/data/evals/stats.json", "/..\\recipe.toml", "/data/latents/%00.json", "/viewer.css/..", "/server.py", "/static/../index.html"])
def test_a_path_out_of_the_pages_is_refused(served, path):
    status, headers, body = ask(served, path)
    assert status == 404 and body == b"there is nothing here" and headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("path", ["/", "/data/overview.json", "/nothing", "/report.html"])
def test_every_answer_forbids_browsers_what_is_not_needed(served, path):
    _, headers, _ = ask(served, path)
    assert headers["content-security-policy"].startswith("default-src 'none'") and "frame-ancestors 'none'" in headers["content-security-policy"]
    assert ("'unsafe-inline'" in headers["content-security-policy"]) == (path == "/report.html")
    assert headers["x-content-type-options"] == "nosniff" and headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["referrer-policy"] == "no-referrer" and "access-control-allow-origin" not in headers and "server" not in headers


@pytest.mark.parametrize("body, headers, status", [
    (b"{", {}, 400), (b"[1]", {}, 400), (b'"x"', {}, 400), (b"\xff", {}, 400), (b"[" * 100_000, {}, 400), (b" " * 1_000_001, {}, 413),
    (b'{"latent": 1}', {"Content_Type": "text/plain"}, 415), (b'{"latent": 1}', {"Content_Type": "application/x-www-form-urlencoded"}, 415),
    (b'{"latent": 1, "star": 5}', {}, 400), (b'{"latent": 1e400, "star": true}', {}, 400)])
def test_what_is_no_request_is_refused(served, trained, body, headers, status):
    assert ask(served, "/api/label", method="POST", body=body, **headers)[0] == status
    assert not (trained.path / "labels.json").exists()


def test_nothing_is_changed_by_a_get(served):
    assert ask(served, "/api/label")[0] == 405
    assert ask(served, "/", method="DELETE")[0] == 405


def test_a_label_is_saved_beside_the_run(run):
    with serving(run) as port:
        assert ask(port, "/data/labels.json")[2] == b'{"latents":{}}'
        status, _, body = ask(port, "/api/label", method="POST", body={"latent": 5, "label": "numbers", "star": True}, Origin=f"http://127.0.0.1:{port}")
        assert (status, json.loads(body)) == (200, {"label": "numbers", "star": True})
        status, _, body = ask(port, "/api/label", method="POST", body={"latent": N, "label": "x", "star": True})
        assert status == 400 and f"latent {N} is not one of 0 to {N - 1}" in json.loads(body)["error"]
    assert json.loads((run.path / "labels.json").read_text())["latents"] == {"5": {"label": "numbers", "star": True}}


def test_results_that_are_added_are_there_without_a_restart(run):
    files = list(run.eval_file("n2g").parent.glob("n2g.*"))
    kept = {file: file.read_bytes() for file in files}
    with serving(run) as port:
        for file in files:
            file.unlink()
        assert [lack["command"] for lack in json.loads(ask(port, "/data/overview.json")[2])["lacks"]] == ["ksparse eval tiny n2g"]
        for file, content in kept.items():
            file.write_bytes(content)
        assert json.loads(ask(port, "/data/overview.json")[2])["lacks"] == []


def test_damaged_results_are_named_to_the_page(run):
    run.eval_file("n2g").write_text("{")
    with serving(run) as port:
        status, _, body = ask(port, "/data/overview.json")
    assert status == 400 and "n2g.json" in json.loads(body)["error"]


def test_an_error_is_short_and_safe_whatever_it_quotes(run):
    run.recipe_file.write_text(run.recipe_file.read_text().replace('lm = "pylm/0.3m"', f'lm = "./<script>\\u202e{("x" * 200 + "/") * 18}"'))
    with serving(run) as port:
        status, _, body = ask(port, "/api/activations", method="POST", body={"text": "x"})
    said = json.loads(body)["error"]
    assert status == 400 and "\u202e" not in said and r"<script>\u202exx" in said and said.endswith("characters)") and len(said) < 2_500


def test_a_port_in_use_is_said(served):
    with pytest.raises(InputError, match=rf"port {served} is in use; give another with --port, or 0"):
        server.listen(served)
    with pytest.raises(InputError, match="port 70000 cannot be had"):
        server.listen(70_000)


def test_without_the_extra_the_command_says_what_to_install(trained):
    code = ("import sys; sys.modules['uvicorn'] = None\nfrom ksparse import cli\n"
            f"cli.main(['view', {str(trained.path)!r}, '--port', '0'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install 'ksparse[serve]'" in done.stderr and "--export FOLDER" in done.stderr
