"""The answers of servers, kept in a run: explain/answers.jsonl, one line for each request.

{"key": a hash of the request, "text": …, "prompt_tokens": …, "answer_tokens": …, "model": …,
"cut": …}

A line that was cut short, as by a full disk, is left out: the server is asked again.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

from ksparse.explain.server import Answer
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder


class Answers:
    """The answers of one run, by request.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: RunFolder):
        self.file = run.file("explain", "answers.jsonl")
        self._known: dict[str, Answer] = {}
        self._lock = threading.Lock()
        if self.file.is_file():
            with atomic.read_errors(self.file):
                lines = self.file.read_bytes().split(b"\n")
            for line in lines:
                self._read(line)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, body: dict[str, Any]) -> Answer | None:
        """Return the answer to a request; None if it was not asked."""
        return self._known.get(jsonio.digest(body))

    def add(self, body: dict[str, Any], answer: Answer) -> None:
        """Write an answer to the end of the file."""
        key = jsonio.digest(body)
        line = json.dumps({"key": key, **answer._asdict()}) + "\n"
        with self._lock, atomic.translate_oserrors(self.file):
            self.file.parent.mkdir(exist_ok=True)
            with self.file.open("ab+") as stream:
                end = stream.seek(0, os.SEEK_END)
                if end:
                    stream.seek(end - 1)
                    if stream.read(1) != b"\n":
                        stream.write(b"\n")
                stream.write(line.encode())
            self._known[key] = answer

    def _read(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            key, text = row["key"], row["text"]
            sent, received = int(row["prompt_tokens"]), int(row["answer_tokens"])
        except (ValueError, RecursionError, LookupError, TypeError):
            return
        model, cut = row.get("model", ""), row.get("cut") is True
        if isinstance(key, str) and isinstance(text, str) and isinstance(model, str):
            self._known[key] = Answer(text, sent, received, model, cut)
