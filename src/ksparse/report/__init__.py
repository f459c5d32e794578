"""A run folder's files -> one page that needs no network, no script and no torch.

write(run)          run/report.html and run/figures/*.svg
draw_figures(run)   the figures of that page as matplotlib figures, by name
draw_figure(run, name)   one of them

source       a run's files, each read once, and the numbers in them
tokens       the one place where text from data is made safe to show
tables       the table of numbers, and how numbers are written
claims       what a good SAE shows, and whether the numbers say so
figures      shared drawing tools: a canvas, SVG, a Picture
findings     what evaluations found of single latents; the viewer reads it too
sections/    one file per section: its table, figures and template; how to add one
page         the sections in their order
inline_figure        the class of figures

sweep, laws  a sweep's folder -> its page; its figures
studies      a study's folder -> its page
sites        a folder of runs at several sites -> the sites side by side
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ksparse.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(run: RunFolder) -> Path:
    """Write report.html and its figures from the files that a run has.

    Args:
        run: the run folder. Evaluations that were not run are named on the page, with the command
            that adds them.

    Returns:
        The page's path.

    Raises:
        InputError: the folder is not a run, or one of its files is a link that leads out of it.

    Example:
        >>> from ksparse import report
        >>> from ksparse.storage.run_folder import open_run
        >>> report.write(open_run("runs/demo"))
        PosixPath('runs/demo/report.html')
    """
    from ksparse.report import page
    from ksparse.storage import atomic

    html, pictures = page.render(run)
    run.remove_leftovers()
    for picture in pictures:
        atomic.write_text(run.file("figures", f"{picture.name}.svg"), picture.svg)
    atomic.write_text(run.report_file, html)
    return run.report_file


def draw_figures(run: RunFolder) -> dict[str, Figure]:
    """Draw the figures of a run's report; those of evaluations that were not run are missing.

    Args:
        run: the run folder. Nothing is written.

    Returns:
        {name: matplotlib figure}, in the order of the page; each is the caller's to change and
        save.

    Raises:
        InputError: the folder is not a run.

    Example:
        >>> import ksparse
        >>> list(ksparse.open_run("runs/demo").figures())[-1]
        'training-l0'
    """
    from ksparse.report import page

    return {picture.name: picture.drawing.figure for picture in page.render(run)[1]}


def draw_figure(run: RunFolder, name: str) -> Figure:
    """Draw one figure of a run's report.

    Args:
        run: the run folder.
        name: its name, or the end of its name after a hyphen: "nmse" for "training-nmse".

    Returns:
        The matplotlib figure.

    Raises:
        InputError: there is no such figure, or none of the run; the others are named.

    Example:
        >>> import ksparse
        >>> type(ksparse.open_run("runs/demo").figure("nmse")).__mro__[1].__name__
        'Figure'
    """
    from ksparse.report.figures import choose_figure

    more = f"Other figures need evaluations: `ksparse eval {run.path}`"
    return choose_figure(draw_figures(run), name, run.path, more)


__all__ = ["draw_figure", "draw_figures", "write"]
