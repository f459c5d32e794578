"""The pages over HTTP, for the browser of one person on this machine.

Only 127.0.0.1 listens. A request must name this machine in Host (or another site's name could be
pointed here), and come from our own pages if it comes from a page at all (or any site that is open
in the browser could read a run, and write labels). Whatever says something of the run wants the
token of this start, or other users of the machine could ask: it comes in the address that is
opened, and the page sends it with each request. A cookie would go to all ports of the machine. What
is answered is looked up in tables; no path is ever joined to a folder.
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
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import parse_qs

from ksparse.errors import InputError, Interrupted, KsparseError, NonFiniteError
from ksparse.report.tokens import safe_text
from ksparse.storage import atomic
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer import static_site
from ksparse.viewer.labels import Labels
from ksparse.viewer.live import Live
from ksparse.viewer.resources import Resources

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
Answer = Callable[[Table], Table]
ADDRESS, HOSTS = (
    "127.0.0.1",
    re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE | re.ASCII),
)
LARGEST = 1_000_000
"""Bytes of a request."""
PATIENCE, ENDING = 30.0, 3
"""Seconds for a request to arrive or an answer to be taken; seconds to end when asked to."""
WAITING = 4
"""Requests that wait for the LM, at most, besides the one that it answers."""
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
    """Return a socket that listens on this machine alone; raise InputError where the port is
    taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        why = (
            "is in use"
            if getattr(error, "errno", None) == errno.EADDRINUSE
            else f"cannot be had ({error})"
        )
        raise InputError(
            f"port {port} {why}; give another with --port, or 0 for any that is free"
        ) from None
    return listener


def serve(
    run: RunFolder, listener: socket.socket, token: str, *, trust_remote_code: bool = False
) -> None:
    """Answer those who have the token until SIGINT or SIGTERM, then raise Interrupted."""
    made = server(run, token, trust_remote_code=trust_remote_code)
    made.run(sockets=[listener])
    if made.ended_by:
        raise Interrupted("stopped", made.ended_by)


def server(run: RunFolder, token: str, *, trust_remote_code: bool = False) -> Server:
    """Return the server of a run."""
    answers = app(run, token, trust_remote_code=trust_remote_code)
    return Server(
        uvicorn.Config(
            answers,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=ENDING,
        )
    )


class Server(uvicorn.Server):
    """uvicorn's, which ends at once and without a word when asked to."""

    ended_by = 0
    """The signal that ended it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at SIGINT and SIGTERM; one that is ignored, as in a background job, stays ignored."""
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
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off is no error
        self.force_exit, self.should_exit, self.ended_by = self.should_exit, True, signum


class Connection(H11Protocol):
    """A connection that is closed where a request does not arrive or an answer is not taken."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._limit = self.loop.call_later(PATIENCE, self._late)

    def on_response_complete(self) -> None:
        self._limit.cancel()
        self._limit = self.loop.call_later(PATIENCE, self._late)
        super().on_response_complete()

    def connection_lost(self, error: Exception | None) -> None:
        self._limit.cancel()
        super().connection_lost(error)

    def send_400_response(self, message: str) -> None:
        """Say what is no HTTP, unless an answer is under way already; nobody else answers then."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(message)
        else:
            self.transport.close()

    def _late(self) -> None:
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete and not cycle.more_body
        if answering and not self.flow.write_paused:
            self._limit = self.loop.call_later(PATIENCE, self._late)
        else:
            self.transport.abort()


def app(run: RunFolder, token: str, *, trust_remote_code: bool = False) -> Any:
    """Return what answers requests, behind the guard."""
    pieces, labels = Fresh(run), Labels(run, run.recipe().sae.n_latents)
    live, turns = Live(run, trust_remote_code=trust_remote_code), Turns()

    def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name == "report.html" and atomic.inside(run.path, name).is_file():
            return Response(
                run.report_file.read_bytes(),
                media_type="text/html; charset=utf-8",
                headers={"Content-Security-Policy": REPORT_POLICY},
            )
        kind = static_site.ASSETS.get(name)
        return (
            Response(
                static_site.asset(name).replace(b'<html lang="en">', b'<html lang="en" data-live>'),
                media_type=kind,
            )
            if kind
            else _nothing(request)
        )

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

    return Guard(
        Starlette(
            routes=[
                Route("/", page),
                Route("/data/{name:path}.json", data),
                _api("label", label, run_in_threadpool),
                _api("activations", activations, turns),
                _api("change", change, turns),
                Route("/{name}", page),
            ],
            exception_handlers={
                KsparseError: _refused,
                OSError: _refused,
                ClientDisconnect: _refused,
                Busy: _busy,
                404: lambda request, error: _nothing(request),
            },
        ),
        token,
    )


class Fresh:
    """The pieces of a run as it is: results that are written while pages are open belong
    together."""

    def __init__(self, run: RunFolder):
        self.run, self._lock = run, threading.Lock()
        self._made: tuple[list[tuple[str, int]], Resources] | None = None

    def now(self) -> Resources:
        """Return the pieces, made anew if a result or a checkpoint is another than before."""
        found = sorted([*(self.run.path / "evals").glob("*.*"), *self.run.checkpoints()])
        stamp = [(file.name, file.stat().st_mtime_ns) for file in found if file.exists()]
        with self._lock:
            if self._made is None or stamp != self._made[0]:
                self._made = stamp, Resources(self.run, block=1)
            return self._made[1]


class Busy(Exception):
    """Too many requests wait for the LM."""


class Turns:
    """One thread for all that needs the LM, and a short queue, so that pages keep their threads.

    The end of the process does not wait for it.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[concurrent.futures.Future, Answer, Table]]
        self._asked = queue.SimpleQueue()
        self._thread, self._here = threading.Thread(target=self._work, daemon=True), 0

    async def __call__(self, answer: Answer, asked: Table) -> Table:
        if self._here > WAITING:
            raise Busy
        if self._thread.ident is None:
            self._thread.start()
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._asked.put((future, answer, asked))
        self._here += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._here -= 1

    def _work(self) -> None:
        while True:
            future, answer, asked = self._asked.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(answer(asked))
            except Exception as error:  # which the request's own task raises
                future.set_exception(error)


def _api(name: str, answer: Answer, run: Callable[[Answer, Table], Awaitable[Table]]) -> Route:
    """Return a route that takes a JSON table and answers with one, worked out by `run`."""

    async def respond(request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0]
        if content_type.strip().lower() != "application/json":
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
        answering = asyncio.ensure_future(run(answer, asked))
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((answering, left), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ClientDisconnect
            return _json(answering.result())
        finally:
            answering.cancel(), left.cancel()

    return Route(f"/api/{name}", respond, methods=["POST"])


async def _left(request: Request) -> None:
    """Wait until whoever asked is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200) -> Response:
    """Answer with JSON of ASCII alone: half a character, which a label may hold, has no UTF-8."""
    return Response(
        json.dumps(value, allow_nan=False, separators=(",", ":")),
        status,
        media_type="application/json",
    )


def _text(asked: dict[str, Any]) -> str:
    if not isinstance(text := asked.get("text"), str):
        raise InputError("the text to read is missing")
    return text


def _nothing(request: Request) -> Response:
    return PlainTextResponse("there is nothing here", 404)


def _refused(request: Request, error: Exception) -> Response:
    """Answer what ksparse refuses with its own words, which may quote what is hostile, or
    endless."""
    asked = isinstance(error, (InputError, NonFiniteError, ClientDisconnect))
    return _json({"error": safe_text(str(error))}, 400 if asked else 507)  # else there is no room


def _busy(request: Request, error: Exception) -> Response:
    return PlainTextResponse(
        f"the LM is at work, and {WAITING} requests wait for it already; ask again in a moment", 429
    )


class Guard:
    """Refuses requests that are not from our own pages, and says to browsers what pages may do."""

    def __init__(self, inner: Any, token: str):
        self.inner, self.token = inner, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        why = refusal(scope["method"], headers)
        of_the_run = scope["path"].removeprefix("/") not in {"", *static_site.ASSETS}
        if not why and of_the_run and not self._knows(scope, headers):
            why = (
                "open the address that `ksparse view` printed when it began: it ends in a "
                "token, without which nothing of the run is shown"
            )

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                more = HEADERS | {"Content-Security-Policy": POLICY}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.lower().encode(), value.encode())
                        for name, value in more.items()
                        if name.lower().encode() not in own
                    ),
                ]
            await send(message)

        await (PlainTextResponse(why, 403) if why else self.inner)(scope, receive, with_headers)

    def _knows(self, scope: Scope, headers: dict[str, str]) -> bool:
        """Tell whether a request has the token, in a header or in the address."""
        asked = parse_qs(scope["query_string"].decode("latin-1"))
        given = [headers.get("authorization", "").removeprefix("Bearer "), *asked.get("token", ())]
        return any(
            secrets.compare_digest(word.encode("utf-8", "replace"), self.token) for word in given
        )


def refusal(method: str, headers: dict[str, str]) -> str:
    """Return why a request is refused; '' if it is not."""
    host = headers.get("host", "")
    if not HOSTS.fullmatch(host):
        return "this server answers as 127.0.0.1 or localhost alone"
    if "origin" in headers and headers["origin"] != f"http://{host}":
        return "this server answers its own pages alone"
    opened = (
        method == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )
    if (
        headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not opened
    ):  # but a link may lead here
        return "this server answers its own pages alone"
    return ""
