"""The pages over HTTP, for browsers on this machine.

Only 127.0.0.1 listens. A request must name this machine in Host (or another site's name could be pointed here), and come from
our own pages if it comes from a page at all (or any site that is open in the browser could read a run, and write labels).
What is answered is looked up in tables; no path is ever joined to a folder.
"""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ksparse.errors import InputError, KsparseError
from ksparse.report.tokens import safe_text
from ksparse.runs import RunFolder
from ksparse.viewer import site
from ksparse.viewer.labels import Labels
from ksparse.viewer.live import Live
from ksparse.viewer.pieces import Pieces

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise InputError(f"serving pages needs {error.name}, which is not installed: pip install 'ksparse[serve]'. "
                     "`ksparse view RUN --export FOLDER` writes pages that need no server") from None

ADDRESS, HOSTS = "127.0.0.1", re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE | re.ASCII)
LARGEST = 1_000_000
"""Bytes of a request."""
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
           "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-store"}


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this machine alone; raise InputError where the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        why = "is in use" if getattr(error, "errno", None) == errno.EADDRINUSE else f"cannot be had ({error})"
        raise InputError(f"port {port} {why}; give another with --port, or 0 for any that is free") from None
    return listener


def serve(run: RunFolder, listener: socket.socket) -> None:
    """Answer until interrupted."""
    server(run).run(sockets=[listener])


def server(run: RunFolder) -> uvicorn.Server:
    """Return the server of a run."""
    return uvicorn.Server(uvicorn.Config(app(run), log_level="warning", access_log=False, server_header=False, lifespan="off"))


def app(run: RunFolder) -> Any:
    """Return what answers requests, behind the guard."""
    pieces, live, labels = Fresh(run), Live(run), Labels(run, run.recipe().sae.n_latents)

    def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name == "report.html" and run.report_file.is_file():
            return Response(run.report_file.read_bytes(), media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": REPORT_POLICY})
        kind = site.ASSETS.get(name)
        return Response(site.asset(name).replace(b'<html lang="en">', b'<html lang="en" data-live>'), media_type=kind) if kind else _nothing(request)

    def data(request: Request) -> Response:
        name = request.path_params["name"]
        found = {"latents": labels.all()} if name == "labels" else pieces.now().get(name)
        if found is None:
            return _nothing(request)
        return _json(found | {"live": True} if name == "overview" else found)

    def label(asked: dict[str, Any]) -> dict[str, Any]:
        return labels.set(asked.get("latent"), asked.get("label", ""), asked.get("star", False))

    def activations(asked: dict[str, Any]) -> dict[str, Any]:
        return live.activations(_text(asked))

    def change(asked: dict[str, Any]) -> dict[str, Any]:
        return live.change(_text(asked), asked.get("latent"), asked.get("value"), asked.get("at"))

    return Guard(Starlette(
        routes=[Route("/", page), Route("/data/{name:path}.json", data), _api("label", label), _api("activations", activations),
                _api("change", change), Route("/{name}", page)],
        exception_handlers={KsparseError: _refused, 404: lambda request, error: _nothing(request)}))


class Fresh:
    """The pieces of a run as it is: results that are written while pages are open belong together."""

    def __init__(self, run: RunFolder):
        self.run, self._lock, self._stamp, self._pieces = run, threading.Lock(), None, None

    def now(self) -> Pieces:
        """Return the pieces, made anew if a result or a checkpoint is another than before."""
        found = sorted([*(self.run.path / "evals").glob("*.*"), *self.run.checkpoints()])
        stamp = [(file.name, file.stat().st_mtime_ns) for file in found if file.exists()]
        with self._lock:
            if stamp != self._stamp:
                self._stamp, self._pieces = stamp, Pieces(self.run, block=1)
            return self._pieces


def _api(name: str, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Route:
    """Return a route that takes a JSON table and answers with one."""
    async def respond(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return PlainTextResponse("a request's body is JSON, and says so", 415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                return PlainTextResponse(f"a request has at most {LARGEST:,} bytes", 413)
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            return PlainTextResponse("a request's body is a JSON table", 400)
        return _json(await run_in_threadpool(answer, asked))

    return Route(f"/api/{name}", respond, methods=["POST"])


def _json(value: Any, status: int = 200) -> Response:
    """Answer with JSON of ASCII alone: half a character, which a label may hold, has no UTF-8."""
    return Response(json.dumps(value, allow_nan=False, separators=(",", ":")), status, media_type="application/json")


def _text(asked: dict[str, Any]) -> str:
    if not isinstance(text := asked.get("text"), str):
        raise InputError("the text to read is missing")
    return text


def _nothing(request: Request) -> Response:
    return PlainTextResponse("there is nothing here", 404)


def _refused(request: Request, error: Exception) -> Response:
    """Answer what ksparse refuses with its own words, which may quote what is hostile, or endless."""
    return _json({"error": safe_text(str(error))}, 400 if isinstance(error, InputError) else 500)


class Guard:
    """Refuses requests that are not from our own pages, and says to browsers what pages may do."""

    def __init__(self, inner: Any):
        self.inner = inner

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        if scope["type"] != "http":  # no websockets
            return
        why = refusal(scope["method"], {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]})

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                more = HEADERS | {"Content-Security-Policy": POLICY}
                message["headers"] = [*message["headers"], *((name.lower().encode(), value.encode()) for name, value in more.items()
                                                             if name.lower().encode() not in own)]
            await send(message)

        await (PlainTextResponse(why, 403) if why else self.inner)(scope, receive, with_headers)


def refusal(method: str, headers: dict[str, str]) -> str:
    """Return why a request is refused; '' if it is not."""
    host = headers.get("host", "")
    if not HOSTS.fullmatch(host):
        return "this server answers as 127.0.0.1 or localhost alone"
    if "origin" in headers and headers["origin"] != f"http://{host}":
        return "this server answers its own pages alone"
    opened = method == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not opened:  # but a link may lead here
        return "this server answers its own pages alone"
    return ""
