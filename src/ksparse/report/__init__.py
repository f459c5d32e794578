"""A run folder's files -> one page that needs no network, no script and no torch.

write(run)   run/report.html and run/figures/*.svg

source    the run's files, read once, with the numbers in them
tokens    the one place where text from data is made safe to show
numbers   results -> the table of numbers           (a Row per number)
claims    results -> what a good SAE shows, and whether it does   (a Claim per claim)
figures   results -> SVG
findings  arrays -> what evaluations found of single latents
probes    tasks -> the section on them
codes     refinement, progressive, latents, subspaces -> the section on them     code_figures
          their figures
latents   arrays -> cards with heat-maps
page      the sections in their order               (a Section per question)

studies   a study's folder -> its page
"""

from pathlib import Path

from ksparse.storage.run_folder import RunFolder


def write(run: RunFolder) -> Path:
    """Write report.html and its figures from whatever files the run has; return the page's path."""
    from ksparse.report import page
    from ksparse.storage import atomic

    html, pictures = page.render(run)
    run.remove_leftovers()
    for picture in pictures:
        atomic.write_text(run.file("figures", f"{picture.name}.svg"), picture.svg)
    atomic.write_text(run.report_file, html)
    return run.report_file


__all__ = ["write"]
