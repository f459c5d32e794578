"""Suites of labelled texts, on which probes are fitted. Plain Python: no torch.

folder      a suite on disk: TASK.jsonl or TASK.jsonl.gz with rows {"text", "label": 0 | 1}
sources     where rows come from: a data set on the Hugging Face Hub, or a local folder
templates   a row of a data set -> labelled texts, one function for each data set
sample      which texts are taken: balanced, chosen by a hash, whatever their order
paper       the 61 tasks of Gao et al. 2024, table 1
builder     builds the tasks into a folder
"""

from ksparse.evals.probing.suites.builder import Report, Step, build
from ksparse.evals.probing.suites.folder import LEAST, TextTask, read, write
from ksparse.evals.probing.suites.paper import TASKS, PaperTask, table

__all__ = [
    "LEAST",
    "TASKS",
    "PaperTask",
    "Report",
    "Step",
    "TextTask",
    "build",
    "read",
    "table",
    "write",
]
