"""The sections of the run report, one file each: its table, its figures and its template.

headline              the three numbers at the top
quality               claims, numbers and figures of the main evaluations; its parts:
                      reconstruction (stats, downstream), probes, explanations (n2g,
                      explained_loss), ablation
latents               example latents with the text that they fire on, the best explained first
probes                what single latents know, task by task
words                 explanations of latents in words, and how far they can be trusted
sanity                whether the SAE is better than controls of it
training              the run's curves
codes                 codes and latents in detail; its parts: refinement, progressive,
                      latent_statistics, subspaces
subject               what was run, and on which machine
reproduction          the commands that make the run and its page again

How to add the section of a new evaluation:

1. Write `sections/NAME.py` with a PART, an `EvaluationPart` (`sections.base`): a NumberGroup that
   says which numbers of the result are shown and how to read them; if it has them, claims, a
   function that draws its figures, and a template for a table of its own. `refinement` is a short
   example, `subspaces` one with a table.
2. Add the PART to PARTS in `codes`, or in `quality` if the evaluation is one of the main ones.
3. If the evaluation needs a heading of its own, as `probes` does, define a SECTION in the same file
   too, and add it to SECTIONS below.

Figures are drawn with `report.figures`, numbers written with `report.tables`, arrays read with
`RunSource.arrays`. Every reader must accept a result that lacks what it looks for: a section says
what is missing and which command adds it. Templates can use the macros of
`report/templates/parts.html.jinja`. The test to copy is `tests/report/test_codes.py`.
"""

from __future__ import annotations

from ksparse.report.sections import (
    codes,
    latents,
    probes,
    quality,
    reproduction,
    sanity,
    subject,
    training,
    words,
)

SECTIONS = (
    quality.SECTION,
    latents.SECTION,
    probes.SECTION,
    words.SECTION,
    sanity.SECTION,
    training.SECTION,
    codes.SECTION,
    subject.SECTION,
    reproduction.SECTION,
)
"""The sections in the order of the page."""
