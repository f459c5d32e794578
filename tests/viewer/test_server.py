"""The server: it answers this machine's own pages, and nobody and nothing else."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ksparse.errors import InputError

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from ksparse.viewer import server  # noqa: E402
from ksparse.viewer.live import Live  # noqa: E402

from .conftest import TOKEN, N, serving  # noqa: E402


def ask(
    port: int, path: str, *, method: str = "GET", body: object = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send one request with the token, and else exactly these headers and this path; a header of '' is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    data = json.dumps(body).encode() if not isinstance(body, (bytes, type(None))) else body
    given = {"Host": f"127.0.0.1:{port}", "Authorization": f"Bearer {TOKEN}"} | (
        {"Content-Type": "application/json", "Content-Length": str(len(data))}
        if data is not None
        else {}
    )
    for name, value in (
        given | {name.replace("_", "-"): value for name, value in headers.items()}
    ).items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(data)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_pages_and_resources_are_served(served):
    status, headers, page = ask(served, "/")
    assert (
        status == 200 and b"data-live" in page and headers["content-type"].startswith("text/html")
    )
    status, headers, body = ask(served, "/data/overview.json")
    assert status == 200 and json.loads(body)["n"] == N and json.loads(body)["live"] is True
    assert ask(served, "/report.html")[0] == 200 and ask(served, "/viewer.css")[0] == 200


def test_only_this_machine_listens(served):
    with server.listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    own = {
        info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    } - {"127.0.0.1", "127.0.1.1"}
    for address in own:
        with pytest.raises(OSError):
            socket.create_connection((address, served), timeout=2).close()


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8765",
        "evil@127.0.0.1",
        "127.0.0.1:x",
        "0.0.0.0",
        "[::1",
        "127.0.0.1/",
    ],
)
def test_a_foreign_host_is_refused(served, host):
    for path in ("/", "/data/overview.json", "/nothing"):
        status, _, body = ask(served, path, Host=host)
        assert status in (400, 403) and b"latents" not in body, (path, body)


def test_localhost_is_this_machine(served):
    assert ask(served, "/", Host=f"localhost:{served}")[0] == 200
    assert ask(served, "/", Host="LOCALHOST:9999")[0] == 200  # a forwarded port


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        "http://localhost:{port}",
        "file://",
    ],
)
def test_a_foreign_origin_is_refused(served, trained, origin):
    origin = origin.format(port=served)
    assert ask(served, "/data/overview.json", Origin=origin)[0] == 403
    assert (
        ask(
            served,
            "/api/label",
            method="POST",
            body={"latent": 1, "label": "x", "star": True},
            Origin=origin,
        )[0]
        == 403
    )
    assert not (trained.path / "labels.json").exists()


def test_our_own_origin_is_answered(served):
    assert (
        ask(
            served,
            "/data/overview.json",
            Origin=f"http://127.0.0.1:{served}",
            Sec_Fetch_Site="same-origin",
        )[0]
        == 200
    )


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_here_but_not_load(served, site):
    assert (
        ask(served, "/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document")[
            0
        ]
        == 200
    )
    for mode, dest in (
        ("no-cors", "script"),
        ("no-cors", "image"),
        ("cors", "empty"),
        ("navigate", "iframe"),
    ):
        assert (
            ask(
                served,
                "/data/overview.json",
                Sec_Fetch_Site=site,
                Sec_Fetch_Mode=mode,
                Sec_Fetch_Dest=dest,
            )[0]
            == 403
        )


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/../../../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/etc/passwd",
        "/data/../../recipe.toml",
        "/data/../recipe.toml.json",
        "/data/%2e%2e%2frecipe.json",
        "/data//etc/passwd.json",
        "/recipe.toml",
        "/labels.json",
        "/checkpoints",
        "/data/evals/stats.json",
        "/..\\recipe.toml",
        "/data/latents/%00.json",
        "/data/run/tiny/recipe.toml.json",
        "/data/run/../recipe.json",
        "/data/run/tiny/../../recipe.json",
        "/data/run/%2e%2e/overview.json",
        "/viewer.css/..",
        "/server.py",
        "/static/../index.html",
    ],
)
def test_a_path_out_of_the_pages_is_refused(served, path):
    status, headers, body = ask(served, path)
    assert (
        status == 404
        and body == b"there is nothing here"
        and headers["content-type"].startswith("text/plain")
    )


@pytest.mark.parametrize("path", ["/", "/data/overview.json", "/nothing", "/report.html"])
def test_every_answer_forbids_browsers_what_is_not_needed(served, path):
    _, headers, _ = ask(served, path)
    assert (
        headers["content-security-policy"].startswith("default-src 'none'")
        and "frame-ancestors 'none'" in headers["content-security-policy"]
    )
    assert ("'unsafe-inline'" in headers["content-security-policy"]) == (path == "/report.html")
    assert (
        headers["x-content-type-options"] == "nosniff"
        and headers["cross-origin-resource-policy"] == "same-origin"
    )
    assert (
        headers["referrer-policy"] == "no-referrer"
        and "access-control-allow-origin" not in headers
        and "server" not in headers
    )


@pytest.mark.parametrize(
    "body, headers, status",
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b'"x"', {}, 400),
        (b"\xff", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b" " * 1_000_001, {}, 413),
        (b'{"latent": 1}', {"Content_Type": "text/plain"}, 415),
        (b'{"latent": 1}', {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        (b'{"latent": 1, "star": 5}', {}, 400),
        (b'{"latent": 1e400, "star": true}', {}, 400),
    ],
)
def test_what_is_no_request_is_refused(served, trained, body, headers, status):
    assert ask(served, "/api/label", method="POST", body=body, **headers)[0] == status
    assert not (trained.path / "labels.json").exists()


def test_nothing_is_changed_by_a_get(served):
    assert ask(served, "/api/label")[0] == 405
    assert ask(served, "/", method="DELETE")[0] == 405


def test_a_label_is_saved_beside_the_run(run):
    with serving(run) as port:
        assert ask(port, "/data/labels.json")[2] == b'{"latents":{}}'
        status, _, body = ask(
            port,
            "/api/label",
            method="POST",
            body={"latent": 5, "label": "numbers", "star": True},
            Origin=f"http://127.0.0.1:{port}",
        )
        assert (status, json.loads(body)) == (200, {"label": "numbers", "star": True})
        status, _, body = ask(
            port, "/api/label", method="POST", body={"latent": N, "label": "x", "star": True}
        )
        assert (
            status == 400 and f"latent {N} is not one of 0 to {N - 1}" in json.loads(body)["error"]
        )
    assert json.loads((run.path / "labels.json").read_text())["latents"] == {
        "5": {"label": "numbers", "star": True}
    }


def test_results_that_are_added_are_there_without_a_restart(run):
    files = list(run.eval_file("n2g").parent.glob("n2g.*"))
    kept = {file: file.read_bytes() for file in files}
    with serving(run) as port:
        for file in files:
            file.unlink()
        assert [
            lack["command"] for lack in json.loads(ask(port, "/data/overview.json")[2])["lacks"]
        ] == ["ksparse eval tiny n2g"]
        for file, content in kept.items():
            file.write_bytes(content)
        assert json.loads(ask(port, "/data/overview.json")[2])["lacks"] == []


def test_damaged_results_are_named_to_the_page(run):
    run.eval_file("n2g").write_text("{")
    with serving(run) as port:
        status, _, body = ask(port, "/data/overview.json")
    lacks = json.loads(body)["lacks"]
    assert status == 200 and any(
        "its result is damaged and left out" in lack["adds"] and "n2g" in lack["command"]
        for lack in lacks
    )


def test_an_error_is_short_and_safe_whatever_it_quotes(run):
    run.recipe_file.write_text(
        run.recipe_file.read_text().replace(
            'lm = "pylm/0.3m"', f'lm = "./<script>\\u202e{("x" * 200 + "/") * 18}"'
        )
    )
    with serving(run) as port:
        status, _, body = ask(port, "/api/activations", method="POST", body={"text": "x"})
    said = json.loads(body)["error"]
    assert (
        status == 400
        and "\u202e" not in said
        and r"<script>\u202exx" in said
        and said.endswith("characters)")
        and len(said) < 2_500
    )


def test_a_port_in_use_is_said(served):
    with pytest.raises(
        InputError, match=rf"port {served} is in use; give another with --port, or 0"
    ):
        server.listen(served)
    with pytest.raises(InputError, match="port 70000 cannot be opened"):
        server.listen(70_000)


def test_without_the_extra_the_command_says_what_to_install(trained):
    code = (
        "import sys; sys.modules['uvicorn'] = None\nfrom ksparse import cli\n"
        f"cli.main(['view', {str(trained.path)!r}, '--port', '0'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 2
        and "pip install 'ksparse[serve]'" in done.stderr
        and "--export FOLDER" in done.stderr
    )


# ---- the token -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/data/overview.json",
        "/data/labels.json",
        "/data/latents/0.json",
        "/data/runs.json",
        "/data/run/tiny/overview.json",
        "/data/run/tiny/nearest/1/tiny.json",
        "/report.html",
        "/report.html?run=tiny",
        "/nothing",
        "/api/label",
        "/api/steer",
    ],
)
@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer x",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        "Bearer \u00e9",
    ],
)
def test_nothing_about_the_run_is_shown_without_the_token(served, path, given):
    status, headers, body = ask(served, path, Authorization=given)
    assert (
        status == 403
        and b"open the address that `ksparse view` printed" in body
        and headers["x-content-type-options"] == "nosniff"
    )


def test_no_label_is_written_without_the_token(served, trained):
    for query in ("", "?token=", "?token=x", f"?token={TOKEN}x", "?token=%ff", "?token=%ed%a0%80"):
        assert (
            ask(
                served,
                f"/api/label{query}",
                method="POST",
                body={"latent": 1, "label": "x", "star": True},
                Authorization="",
            )[0]
            == 403
        )
    assert not (trained.path / "labels.json").exists()


def test_the_token_may_be_in_the_address(served):
    assert ask(served, f"/report.html?token={TOKEN}", Authorization="")[0] == 200
    assert ask(served, f"/data/overview.json?x=1&token=x&token={TOKEN}", Authorization="")[0] == 200


def test_the_page_itself_tells_nothing_of_a_run_and_needs_no_token(served):
    assert b"tiny" not in ask(served, "/", Authorization="")[2]
    assert (
        ask(served, "/", Authorization="")[0] == ask(served, "/base.js", Authorization="")[0] == 200
    )


def test_the_token_does_not_open_the_door_to_other_sites(served):
    assert ask(served, f"/data/overview.json?token={TOKEN}", Origin="http://evil.example")[0] == 403
    assert ask(served, f"/data/overview.json?token={TOKEN}", Host="evil.example")[0] == 403


# ---- what a request may hold ---------------------------------------------------------------------


def test_types_have_no_case(served):
    assert (
        ask(
            served,
            "/api/activations",
            method="POST",
            body={"text": "x"},
            Content_Type="Application/JSON; charset=UTF-8",
        )[0]
        == 200
    )


@pytest.mark.parametrize(
    "body, why",
    [
        ('{"text": "x", "latents": [[1, 1%s]]}' % ("0" * 400), "multiple of its largest"),
        ('{"text": "x", "latents": [[1, -1e308]]}', "multiple of its largest"),
        ('{"text": "x", "latents": [[1%s, 1]]}' % ("0" * 400), "does not exist"),
        ('{"text": "x", "latents": [[1, 1]], "at": 1%s}' % ("0" * 400), "whole number from 0"),
        ('{"text": "x", "latents": [[1, 1]], "at": 99}', "token 99 is not one of 0 to"),
        (
            '{"text": "x", "latents": [[%s1%s, 1]]}' % ("[" * 900, "]" * 900),
            "named by its number, not by a list",
        ),
        ('{"text": "x", "latents": [[1, {"a": 1}]]}', "not at a dict"),
        ('{"text": "x", "latents": [[1, 1]], "tokens": 1000}', "whole number from 1 to 256"),
        ('{"text": "x", "latents": [[1, 1]], "run": "tin"}', "there is no run 'tin' here"),
        ('{"text": "x", "latents": [[1, 1]], "run": ["tiny"]}', "there is no run a list here"),
        (
            '{"text": "%s", "latents": [[1, 1]]}' % ("x" * 20_001),
            "20,001 characters; at most 20,000",
        ),
        ('{"text": 1, "latents": [[1, 1]]}', "the text to read is missing"),
    ],
)
def test_what_cannot_be_steered_is_answered_with_its_reason(served, body, why):
    status, _, said = ask(served, "/api/steer", method="POST", body=body.encode())
    assert status == 400 and why in json.loads(said)["error"]


def test_steering_answers_with_both_texts(served):
    body = {"text": "x \ud800", "latents": [[1, 1.0], [2, -1]], "tokens": 3}
    status, _, answer = ask(served, "/api/steer", method="POST", body=body)
    found = json.loads(answer)
    assert status == 200 and found["tokens"][-1].endswith("?")
    assert [row["latent"] for row in found["latents"]] == [1, 2]
    assert found["plain"] and found["changed"] and found["predictions"]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, path",
    [
        ("report.html", "/report.html"),
        ("labels.json", "/data/labels.json"),
        ("evals/n2g.json", "/data/overview.json"),
        ("evals/stats.safetensors", "/data/overview.json"),
    ],
)
def test_a_link_in_a_run_is_not_served(run, tmp_path, name, path):
    (tmp_path / "secret").write_text('{"format": 1, "latents": {"1": {"label": "secret"}}}')
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "secret")
    with serving(run) as port:
        status, _, body = ask(port, path)
        assert status == 400 and f"{name} leads out of" in json.loads(body)["error"]
        assert ask(
            port, "/api/label", method="POST", body={"latent": 1, "label": "x", "star": True}
        )[0] == (400 if name == "labels.json" else 200)
    assert "secret" in (tmp_path / "secret").read_text()


@pytest.mark.parametrize(
    "number, status, why",
    [
        (errno.ENOSPC, 507, "disk full while writing"),
        (errno.EACCES, 507, "cannot write"),
        (errno.EIO, 507, "Input/output error"),
    ],
)
def test_a_label_that_finds_no_room_is_answered_with_the_reason(
    run, monkeypatch, number, status, why
):
    def full(handle):
        raise OSError(number, os.strerror(number))

    with serving(run) as port:
        ask(port, "/api/label", method="POST", body={"latent": 1, "label": "kept", "star": True})
        monkeypatch.setattr(os, "fsync", full)
        found, _, body = ask(
            port, "/api/label", method="POST", body={"latent": 2, "label": "x", "star": True}
        )
        assert found == status and why in json.loads(body)["error"]
        assert json.loads(ask(port, "/data/labels.json")[2])["latents"] == {
            "1": {"label": "kept", "star": True}
        }


# ---- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"GET /data/overview.json HTTP/1.1\r\nHost: 127",
        b"POST /api/label HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{" % TOKEN.encode(),
    ],
)
def test_a_request_that_does_not_arrive_is_given_up(trained, monkeypatch, half):
    monkeypatch.setattr(server, "PATIENCE", 0.05)
    with (
        serving(trained) as port,
        socket.create_connection(("127.0.0.1", port), timeout=30) as client,
    ):
        client.sendall(half)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1_000) == b""


def test_a_connection_is_given_up_after_its_last_answer_too(trained, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.05)
    with (
        serving(trained) as port,
        socket.create_connection(("127.0.0.1", port), timeout=30) as client,
    ):
        client.sendall(b"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(1_000):
                answer += part
    assert answer.startswith(b"HTTP/1.1 403")


def test_pages_are_answered_and_few_requests_wait_while_the_lm_works(trained, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(self, text, stop):
        begun.set()
        go_on.wait(60)
        return {"text": text}

    monkeypatch.setattr(Live, "activations", slow)
    waiting = server.MOST_WAITING + 1
    with serving(trained) as port:
        answers: list[int] = []
        ask_one = lambda: answers.append(
            ask(port, "/api/activations", method="POST", body={"text": "x"})[0]
        )  # noqa: E731
        threads = [threading.Thread(target=ask_one) for _ in range(60)]
        threads[0].start()
        assert begun.wait(30)
        for thread in threads[1:]:
            thread.start()
        while len(answers) < 60 - waiting:
            assert ask(port, "/data/overview.json")[0] == 200
        assert {*answers} == {429}
        status, _, body = ask(port, "/api/steer", method="POST", body={"text": "x"})
        assert (
            status == 429
            and body == b"the LM is busy, and 4 requests wait for it already; try again in a moment"
        )
        go_on.set()
        for thread in threads:
            thread.join(60)
    assert answers.count(200) == waiting and answers.count(429) == 60 - waiting


def test_a_client_that_disconnects_frees_its_place(trained, monkeypatch):
    begun, go_on, read = threading.Event(), threading.Event(), []

    def slow(self, text, stop):
        read.append(text)
        begun.set()
        go_on.wait(60)
        return {"text": text}

    monkeypatch.setattr(Live, "activations", slow)
    head = f"POST /api/activations HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n"
    with serving(trained) as port:
        gone = threading.Event()
        left = server._wait_for_disconnect

        async def noted(request):
            await left(request)
            gone.set()

        monkeypatch.setattr(server, "_wait_for_disconnect", noted)
        first = threading.Thread(
            target=ask,
            args=(port, "/api/activations"),
            kwargs={"method": "POST", "body": {"text": "first"}},
        )
        first.start()
        assert begun.wait(30)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(head.encode() + b'{"text": "gone"}')
        assert gone.wait(30)
        assert {ask(port, "/nothing")[0] for _ in range(3)} == {404}  # by then its place is free
        go_on.set()
        first.join(30)
        assert ask(port, "/api/activations", method="POST", body={"text": "last"})[0] == 200
    assert read == ["first", "last"]


@contextlib.contextmanager
def viewing(folder: Path, *words: str, ignoring: int = 0):
    """Run `ksparse view`; yield the process and the port."""
    code = f"import signal, sys; {ignoring} and signal.signal({ignoring}, signal.SIG_IGN); from ksparse.cli import main; main(sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", code, "view", str(folder), *words, "--port", "0"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            address = process.stdout.readline().split()[1]
            assert (
                address.startswith("http://127.0.0.1:")
                and len(address.partition("/?token=")[2]) == 32
            )
            port = int(address.split(":")[2].partition("/")[0])
            ask(port, "/")  # it answers, so the signals are its own by now
            yield process, port, address.partition("=")[2]
        finally:
            process.kill()


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_whatever_is_under_way(run, signum, code):
    with viewing(run.path) as (process, port, token), contextlib.ExitStack() as clients:
        halves = (
            b"GET / HT",
            b"POST /api/label HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            % token.encode(),
        )
        for half in (*halves, b"") * 5:
            clients.enter_context(
                socket.create_connection(("127.0.0.1", port), timeout=30)
            ).sendall(half)
        assert ask(port, "/data/overview.json", Authorization=f"Bearer {token}")[0] == 200
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, "stopped\n")


def test_a_background_job_whose_interrupts_are_ignored_goes_on(run):
    with viewing(run.path, ignoring=signal.SIGINT) as (process, port, token):
        process.send_signal(signal.SIGINT)
        assert ask(port, "/data/overview.json", Authorization=f"Bearer {token}")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


def test_an_export_ended_by_a_signal_leaves_nothing(run, tmp_path):
    code = (
        "import os, signal, sys; from ksparse import cli; from ksparse.viewer import static_site\n"
        "static_site._install = lambda *given: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"cli.main(['view', {str(run.path)!r}, '--export', {str(tmp_path / 'site')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 143
        and "ksparse view: stopped" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "site").exists()


def test_a_request_that_turns_out_to_be_no_http_ends_quietly(trained):
    """Its head began to be answered when its body was seen to be none."""
    head = (
        "GET /data/overview.json HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with serving(trained) as port:
        for rest in (b"x\r\n", b"1\r\nxx\r\n", b"0\r\n\r\nGET x\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(head.encode() + rest)
                assert client.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 403"))
        assert ask(port, "/data/overview.json")[0] == 200
