"""A run folder's files -> one page that needs no network, no script and no torch.

write(run)   run/report.html and run/figures/*.svg

source       a run's files, each read once, and the numbers in them
tokens       the one place where text from data is made safe to show
tables       the table of numbers, and how numbers are written
claims       what a good SAE shows, and whether the numbers say so
figures      shared drawing tools: a canvas, SVG, a Picture
findings     what evaluations found of single latents; the viewer reads it too
sections/    one file per section: its table, figures and template; how to add one
page         the sections in their order

sweep, laws  a sweep's folder -> its page; its figures
studies      a study's folder -> its page
"""

from __future__ import annotations

from pathlib import Path

from ksparse.storage.run_folder import RunFolder


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


__all__ = ["write"]
