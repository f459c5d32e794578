"""A run's latents in the browser, one by one. The static part reads files and needs no torch.

export(run, folder)   pages for any web host, or for a folder that is opened by a double click
serve(run, socket, token)    the same pages from 127.0.0.1 for who has the token, and the LM

pieces    the run's files -> pieces of JSON, each small whatever the number of latents
reading   what all pieces need of the files          columns   one number of every latent after
          another
details   everything on a block of latents           index     from tokens and tasks to latents
weights   the decoder -> nearest latents, a plane to draw them on
labels    names and stars that a reader gives, beside the run
site      pieces -> a folder
server    pieces -> HTTP, on this machine alone                 (the extra `serve`)
live      a text -> its latents; a latent held -> another text  (loads the LM)
assets/   the page: HTML, CSS and JavaScript as they are, with no build step
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from ksparse.storage.run_folder import RunFolder

Observe = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def export(
    run: RunFolder, folder: Path, *, observe: Observe = lambda what, done, total: None
) -> Path:
    """Write the static pages of a run into a folder of their own; return the page to open."""
    from ksparse.viewer import static_site

    return static_site.write(run, folder, observe=observe)


def listen(port: int) -> socket.socket:
    """Return a socket bound to 127.0.0.1; port 0 takes any that is free."""
    from ksparse.viewer import server

    return server.listen(port)


def serve(
    run: RunFolder, listener: socket.socket, token: str, *, trust_remote_code: bool = False
) -> None:
    """Answer browsers on this machine that have the token; raise Interrupted at SIGINT and SIGTERM.

    trust_remote_code: let code that comes with the LM run; nothing in the run's folder can.
    """
    from ksparse.viewer import server

    server.serve(run, listener, token, trust_remote_code=trust_remote_code)


__all__ = ["export", "listen", "serve"]
