"""Requests to an OpenAI-compatible server: POST URL/chat/completions."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from ksparse.errors import InputError, KsparseError

LARGEST_RESPONSE = 4_000_000
"""Bytes of a response at most."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before a request is sent again: doubled with each try, up to the longest."""
_RETRIED = {408, 409, 425, 429}
_ADVICE = {
    401: "; set the environment variable {variable} to the server's API key",
    403: "; set the environment variable {variable} to the server's API key",
    404: "; check --url, which ends in /v1 on most servers, and --model",
}
_LESS = "; ask with smaller --examples or --shown, or start the server with a longer context"


class ServerError(KsparseError):
    """The server that explains latents did not answer, in as many tries as were allowed.

    Example:
        >>> ServerError("http://127.0.0.1:8000/v1 did not answer").exit_code
        1
    """


class Answer(NamedTuple):
    """A server's answer, and what it says about it.

    Example:
        >>> Answer("names of cities", prompt_tokens=700, answer_tokens=4).cut
        False
    """

    text: str
    prompt_tokens: int = 0
    """Tokens of the request, as counted by the server; 0 where it does not say."""
    answer_tokens: int = 0
    """Tokens of the answer, as counted by the server; 0 where it does not say."""
    model: str = ""
    """The model that answered, in the server's words; "" where it does not say."""
    cut: bool = False
    """Whether the answer ends because it has as many tokens as were allowed."""


class _Retry(Exception):
    """A failure that may pass: what happened, and the seconds that the server asked to wait."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirects: the API key would go along to another address."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        """Return None: the response is then an error of its own code."""


class ChatServer:
    """One model of a server.

    Args:
        url: the address, up to and with /v1.
        model: the model's name there.
        key: the API key; "" for none.
        key_variable: where the key comes from, for messages.
        per_minute: requests a minute at most; 0: no limit.
        tries: times to send a request.
        timeout: seconds to wait for an answer.
        sleep: wait for some seconds.

    Raises:
        InputError: the address or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        *,
        key_variable: str = "KSPARSE_API_KEY",
        per_minute: int = 0,
        tries: int = 6,
        timeout: float = 120,
        sleep: Callable[[float], None] = time.sleep,
    ):
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not host or not plain:
            raise InputError(
                f"url is {url[:200]!r}; it must be the address of a server, such as "
                "http://127.0.0.1:8000/v1"
            )
        if parts.username is not None or parts.query or parts.fragment:
            raise InputError(
                "url must be a plain address without a user, a query or a fragment; the API key "
                f"comes from the environment variable {key_variable}"
            )
        if not key.isascii() or not key.isprintable():
            raise InputError(f"the key in {key_variable} has characters that no header can hold")
        self.url, self.model, self.key, self.key_variable = (
            url.rstrip("/"),
            model,
            key,
            key_variable,
        )
        self.tries, self.timeout, self.sleep = tries, timeout, sleep
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if host in ("localhost", "127.0.0.1", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def body(
        self,
        messages: list[dict[str, str]],
        max_tokens: int,
        response_format: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the JSON of a request."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        return body | ({"response_format": response_format} if response_format else {})

    def ask(self, body: dict[str, Any], stop: threading.Event | None = None) -> Answer:
        """Return the server's answer to a request.

        What may pass is tried again after a pause that doubles each time: HTTP 408, 409, 425, 429
        and 5xx, a connection that fails, is cut or is silent too long, and a response that is not
        what it should be. The pause is not shorter than the server's Retry-After.

        Args:
            body: the request.
            stop: when set, a request is not tried again.

        Raises:
            ServerError: every try has failed.
            InputError: the server refuses the request.
        """
        wait, problem = FIRST_WAIT, ""
        for attempt in range(self.tries):
            self._keep_rate()
            try:
                return self._send(body)
            except _Retry as retry:
                problem = str(retry)
                if attempt + 1 == self.tries or (stop is not None and stop.is_set()):
                    break
                self.sleep(min(max(wait, retry.wait), LONGEST_WAIT))
                wait = min(2 * wait, LONGEST_WAIT)
        raise ServerError(f"{self.url} gives no answer after {attempt + 1} tries: {problem}")

    def _keep_rate(self) -> None:
        """Wait until the next request may be sent."""
        if not self._interval:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval
        if start > now:
            self.sleep(start - now)

    def _send(self, body: dict[str, Any]) -> Answer:
        headers = {"Content-Type": "application/json", "User-Agent": "ksparse"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content = response.read(LARGEST_RESPONSE + 1)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise _Retry(f"{reason or type(error).__name__}") from None
        if len(content) > LARGEST_RESPONSE:
            raise _Retry(f"a response of more than {LARGEST_RESPONSE:,} bytes")
        return _read_answer(content)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = error.read(1000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        what = f"HTTP {error.code}: {said.strip()[:300]!r}"
        if error.code in _RETRIED or error.code >= 500:
            return _Retry(what, _seconds(error.headers.get("Retry-After")))
        advice = _ADVICE.get(error.code, "").format(variable=self.key_variable)
        if error.code in (400, 413, 422) and "context" in said.lower():
            advice = _LESS
        return InputError(
            f"{self.url} refuses the request for model {self.model!r}, {what}{advice}"
        )


def _seconds(header: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 where it is missing or a date."""
    return float(header) if header and header.isascii() and header.isdecimal() else 0.0


def _read_answer(content: bytes) -> Answer:
    """Return the answer in a response; raise _Retry if there is none."""
    if content.startswith(b"data:"):
        raise _Retry("a stream of parts, which was not asked for")
    try:
        table = json.loads(content)
        choice = table["choices"][0]
        text = choice["message"].get("content")
        usage = table.get("usage") or {}
        counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
        model, cut = table.get("model"), choice.get("finish_reason") == "length"
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise _Retry(f"a response that is no chat completion: {content[:200]!r}") from None
    if text is None:  # a refusal, or a model that only thought
        text = ""
    if not isinstance(text, str):
        raise _Retry(f"a response whose content is no text: {content[:200]!r}")
    sent, received = (count if type(count) is int and count > 0 else 0 for count in counts)
    return Answer(text, sent, received, model if isinstance(model, str) else "", cut)
