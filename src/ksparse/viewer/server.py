"""The pages over HTTP, for the browser of one person on this machine.

What keeps others out:

- The server listens on 127.0.0.1 only.
- A request must name this machine in Host, since DNS can point a foreign name here.
- A request from a page must come from the server's own pages, since any site that is open in the
  browser could otherwise read the run and write labels.
- Everything about the run needs the token of this start, since other users of the machine could
  otherwise ask. The token is in the address that is opened, and the page sends it with each
  request. A cookie would be sent to every port of the machine.
- Names are looked up in tables; no path of a request is joined to a folder.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import json
import logging
import queue
import re
import secrets
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs

from ksparse.errors import InputError, Interrupted, KsparseError, NonFiniteError
from ksparse.report.tokens import safe_text
from ksparse.storage import atomic
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer import static_site
from ksparse.viewer.live import Stopped
from ksparse.viewer.requests import SteerRequest, read_text
from ksparse.viewer.runs import Runs

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise InputError(
        f"serving pages needs {error.name}, which is not installed: pip install 'ksparse[serve]'. "
        "`ksparse view RUN --export FOLDER` writes pages that need no server"
    ) from None

Table = dict[str, Any]
LMHandler = Callable[[Table, threading.Event], Table]
"""An event is set when nobody waits for the answer any more."""
Shown = RunFolder | Sequence[RunFolder]
"""A run, or several."""
ADDRESS = "127.0.0.1"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE | re.ASCII)
"""The values of Host that are answered."""
MOST_BYTES = 1_000_000
"""Bytes of a request at most."""
PATIENCE = 30.0
"""Seconds for a request to arrive, or for a response to be taken."""
SHUTDOWN = 3
"""Seconds for open requests to end at a shutdown."""
MOST_WAITING = 4
"""Requests that wait for the LM at most, besides the one that it answers."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' "
    "data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this machine only; raise InputError if the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        in_use = getattr(error, "errno", None) == errno.EADDRINUSE
        problem = "is in use" if in_use else f"cannot be opened ({error})"
        raise InputError(
            f"port {port} {problem}; give another with --port, or 0 for any that is free"
        ) from None
    return listener


def serve(
    runs: Shown, listener: socket.socket, token: str, *, trust_remote_code: bool = False
) -> None:
    """Answer requests until SIGINT or SIGTERM, then raise Interrupted."""
    http = make_server(runs, token, trust_remote_code=trust_remote_code)
    http.run(sockets=[listener])
    if http.ended_by:
        raise Interrupted("stopped", http.ended_by)


def make_server(runs: Shown, token: str, *, trust_remote_code: bool = False) -> Server:
    """Return the server of a run, or of several."""
    return Server(
        uvicorn.Config(
            app(runs, token, trust_remote_code=trust_remote_code),
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=SHUTDOWN,
        )
    )


class Server(uvicorn.Server):
    """uvicorn's server; a signal ends it at once and without a message."""

    ended_by = 0
    """The signal that ended it; 0 while it runs."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at SIGINT and SIGTERM, unless they are ignored, as in a background job."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            signums = (signal.SIGINT, signal.SIGTERM)
            before = {
                signum: signal.signal(signum, self._end)
                for signum in signums
                if signal.getsignal(signum) is not signal.SIG_IGN
            }
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _end(self, signum: int, frame: Any) -> None:
        # Requests that are cut off are no errors.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.force_exit, self.should_exit, self.ended_by = self.should_exit, True, signum


class Connection(H11Protocol):
    """A connection that closes if a request does not arrive or a response is not taken."""

    def connection_made(self, transport: Any) -> None:
        """Start the time limit."""
        super().connection_made(transport)
        self._limit = self.loop.call_later(PATIENCE, self._end_late)

    def on_response_complete(self) -> None:
        """Start the time limit of the next request."""
        self._limit.cancel()
        self._limit = self.loop.call_later(PATIENCE, self._end_late)
        super().on_response_complete()

    def connection_lost(self, error: Exception | None) -> None:
        """End the time limit."""
        self._limit.cancel()
        super().connection_lost(error)

    def send_400_response(self, message: str) -> None:
        """Answer invalid HTTP, unless a response has begun: then only close the connection."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(message)
        else:
            self.transport.close()

    def _end_late(self) -> None:
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete and not cycle.more_body
        if answering and not self.flow.write_paused:
            self._limit = self.loop.call_later(PATIENCE, self._end_late)
        else:
            self.transport.abort()


def app(runs: Shown, token: str, *, trust_remote_code: bool = False) -> Any:
    """Return the ASGI application of a run, or of several, behind the guard."""
    shown, queue_for_lm = Runs(runs, trust_remote_code=trust_remote_code), LMQueue()

    def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name == "report.html":
            return _report(shown.get(request.query_params.get("run")).run) or _not_found(request)
        media_type = static_site.ASSETS.get(name)
        if media_type is None:
            return _not_found(request)
        content = static_site.asset(name)
        content = content.replace(b'<html lang="en">', b'<html lang="en" data-live>')
        return Response(content, media_type=media_type)

    def data(request: Request) -> Response:
        resource = shown.resource(request.path_params["name"])
        return _not_found(request) if resource is None else _json(resource)

    def label(body: Table) -> Table:
        labels = shown.get(body.get("run")).labels
        return labels.set(body.get("latent"), body.get("label", ""), body.get("star", False))

    def activations(body: Table, stop: threading.Event) -> Table:
        return shown.get(body.get("run")).live.activations(read_text(body), stop)

    def steer(body: Table, stop: threading.Event) -> Table:
        return shown.get(body.get("run")).live.steer(SteerRequest.read(body), stop)

    return Guard(
        Starlette(
            routes=[
                Route("/", page),
                Route("/data/{name:path}.json", data),
                _api_route("label", lambda body: run_in_threadpool(label, body)),
                _api_route("activations", lambda body: queue_for_lm(activations, body)),
                _api_route("steer", lambda body: queue_for_lm(steer, body)),
                Route("/{name}", page),
            ],
            exception_handlers={
                KsparseError: _error,
                OSError: _error,
                ClientDisconnect: _error,
                Busy: _busy,
                404: lambda request, error: _not_found(request),
            },
        ),
        token,
    )


def _report(run: RunFolder) -> Response | None:
    """Return the report of a run; None without one."""
    if not atomic.inside(run.path, run.report_file.name).is_file():
        return None
    return Response(
        static_site.report_page(run),
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": REPORT_POLICY},
    )


class Busy(Exception):
    """Too many requests wait for the LM."""


class LMQueue:
    """One thread for everything that needs the LM, and a short queue; pages keep their threads.

    The thread is a daemon, so the end of the process does not wait for it.
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[
            tuple[concurrent.futures.Future, LMHandler, Table, threading.Event]
        ] = queue.SimpleQueue()
        self._thread, self._count = threading.Thread(target=self._work, daemon=True), 0

    async def __call__(self, handle: LMHandler, body: Table) -> Table:
        """Return handle(body, stop), computed in the thread; raise Busy if too many requests wait.

        If nobody waits for it any more, `stop` is set.
        """
        if self._count > MOST_WAITING:
            raise Busy
        if self._thread.ident is None:
            self._thread.start()
        future: concurrent.futures.Future = concurrent.futures.Future()
        stop = threading.Event()
        self._requests.put((future, handle, body, stop))
        self._count += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._count -= 1
            stop.set()

    def _work(self) -> None:
        while True:
            future, handle, body, stop = self._requests.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(handle(body, stop))
            except Stopped:
                future.set_exception(ClientDisconnect())
            except Exception as error:  # the request's own task raises it
                future.set_exception(error)


def _api_route(name: str, handle: Callable[[Table], Awaitable[Table]]) -> Route:
    """Return a route that takes a JSON table and answers with one.

    Args:
        name: the last part of the path.
        handle: compute the answer on a thread.
    """

    async def respond(request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0]
        if content_type.strip().lower() != "application/json":
            return PlainTextResponse(
                "a request's body must be JSON, and its type application/json", 415
            )
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return PlainTextResponse(f"a request has at most {MOST_BYTES:,} bytes", 413)
        try:
            table = json.loads(body)
        except (ValueError, RecursionError):
            table = None
        if not isinstance(table, dict):
            return PlainTextResponse("a request's body must be a JSON table", 400)
        answer = asyncio.ensure_future(handle(table))
        disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait((answer, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return _json(answer.result())
        finally:
            answer.cancel()
            disconnect.cancel()

    return Route(f"/api/{name}", respond, methods=["POST"])


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200) -> Response:
    """Return a response of ASCII JSON, since lone surrogates, as in labels, have no UTF-8."""
    return Response(
        json.dumps(value, allow_nan=False, separators=(",", ":")),
        status,
        media_type="application/json",
    )


def _not_found(request: Request) -> Response:
    return PlainTextResponse("there is nothing here", 404)


def _error(request: Request, error: Exception) -> Response:
    """Return an error's message, made safe, since it may quote hostile or endless text."""
    is_clients = isinstance(error, (InputError, NonFiniteError, ClientDisconnect))
    # All other errors mean too little disk or memory.
    return _json({"error": safe_text(str(error))}, 400 if is_clients else 507)


def _busy(request: Request, error: Exception) -> Response:
    return PlainTextResponse(
        f"the LM is busy, and {MOST_WAITING} requests wait for it already; try again in a moment",
        429,
    )


class Guard:
    """Middleware that refuses foreign requests, and tells browsers what pages may do.

    Args:
        inner: the application.
        token: the secret that requests about the run must carry.
    """

    def __init__(self, inner: Any, token: str):
        self.inner, self.token = inner, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with 403, or pass it on and add headers to the response (ASGI)."""
        if scope["type"] != "http":  # no websockets
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        reason = reason_to_refuse(scope["method"], headers)
        about_the_run = scope["path"].removeprefix("/") not in {"", *static_site.ASSETS}
        if not reason and about_the_run and not self._has_token(scope, headers):
            reason = (
                "open the address that `ksparse view` printed when it started: it ends in a "
                "token, without which nothing about the run is shown"
            )

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                defaults = HEADERS | {"Content-Security-Policy": POLICY}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.lower().encode(), value.encode())
                        for name, value in defaults.items()
                        if name.lower().encode() not in names
                    ),
                ]
            await send(message)

        await (PlainTextResponse(reason, 403) if reason else self.inner)(
            scope, receive, with_headers
        )

    def _has_token(self, scope: Scope, headers: dict[str, str]) -> bool:
        """Return whether a request has the token, in a header or in the address."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        header = headers.get("authorization", "").removeprefix("Bearer ")
        return any(
            secrets.compare_digest(token.encode("utf-8", "replace"), self.token)
            for token in (header, *query.get("token", ()))
        )


def reason_to_refuse(method: str, headers: dict[str, str]) -> str:
    """Return why a request is refused; "" if it is not."""
    host = headers.get("host", "")
    if not HOSTS.fullmatch(host):
        return "this server answers only as 127.0.0.1 or localhost"
    if "origin" in headers and headers["origin"] != f"http://{host}":
        return "this server answers only its own pages"
    is_navigation = (
        method == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )
    # A link from another site may lead here, but its pages may not load anything.
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not is_navigation:
        return "this server answers only its own pages"
    return ""
