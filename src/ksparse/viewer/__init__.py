"""A run's latents in the browser, one by one. The static part reads files and needs no torch.

export(run, folder)            pages for any web host, or to open from the disk
serve(runs, listener, token)   the same pages from 127.0.0.1 for whoever has the token, and the LM

resources    a run's files -> resources: JSON objects, small however many latents there are
run_data     what all resources need of the files
columns      a number of every latent, for tables and maps
details      everything on a block of latents
start        the start page: latents worth a look, example searches, what to run next
index        from tokens and tasks to latents
weights      the decoder -> nearest latents
layouts      the decoder -> a place of every latent in two dimensions
regions      the dense regions of a layout, and their tokens
maps         layouts and regions -> the map's resources
labels       names and stars that a reader gives, stored beside the run
static_site  resources -> a folder of files
server       resources -> HTTP, on this machine only            (needs the extra `serve`)
runs         the runs that a server shows, by name; the nearest latents of one in another
requests     what a page asks of the LM, checked
live         a text -> its latents; latents held -> the text's continuation     (loads the LM)
assets/      the page: HTML, CSS and JavaScript as they are, without a build step
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from ksparse.progress import Progress, no_progress
from ksparse.storage.run_folder import RunFolder


def export(
    run: RunFolder,
    folder: Path,
    *,
    observe: Progress = no_progress,
) -> Path:
    """Write the static pages of a run into a folder.

    Args:
        run: the run.
        folder: a new or empty folder, or one that holds an earlier export.
        observe: called as the pages are written.

    Returns:
        The page to open.

    Raises:
        InputError: the folder holds other files that are in the way.

    Example:
        >>> from pathlib import Path
        >>> from ksparse import viewer
        >>> from ksparse.storage.run_folder import open_run
        >>> viewer.export(open_run("runs/demo"), Path("site"))
        PosixPath('site/index.html')
    """
    from ksparse.viewer import static_site

    return static_site.write(run, folder, observe=observe)


def lay_out(run: RunFolder, *, observe: Progress = no_progress) -> bool:
    """Lay a run's latents out by UMAP, for the map, and keep the layout in the run's folder.

    Args:
        run: the run.
        observe: called as the work gets on.

    Returns:
        False if the folder has that layout already.

    Raises:
        InputError: umap-learn is not installed, the run has no SAE yet, or too few latents fire.
    """
    from ksparse.viewer import maps

    return maps.lay_out(run, observe=observe)


def listen(port: int) -> socket.socket:
    """Return a socket bound to 127.0.0.1.

    Args:
        port: the port; 0 takes any free one.

    Raises:
        InputError: the port is in use or cannot be opened.
    """
    from ksparse.viewer import server

    return server.listen(port)


def serve(
    runs: RunFolder | Sequence[RunFolder],
    listener: socket.socket,
    token: str,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Serve the pages of a run, or of several, to browsers on this machine until SIGINT or SIGTERM.

    Args:
        runs: the run, or several; each is opened when a page first asks for it.
        listener: a socket from `listen`.
        token: the secret that requests must carry.
        trust_remote_code: let code that comes with the LM run. Nothing in the run's folder can set
            this.

    Raises:
        InputError: a run is given twice.
        Interrupted: a signal ended the server.
    """
    from ksparse.viewer import server

    server.serve(runs, listener, token, trust_remote_code=trust_remote_code)


__all__ = ["export", "lay_out", "listen", "serve"]
