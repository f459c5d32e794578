"""Suites of labelled texts, on which probes are fitted. Plain Python: no torch.

folder     a suite on disk: TASK.jsonl or TASK.jsonl.gz, rows {"text", "label": 0 | 1}      read,
           write, TextTask
sources    where rows come from: a data set on the Hugging Face Hub, or a folder in its place
           Source, Part, opened
templates  a row of a data set -> texts with their label                                       one
    function a data set
sample     which of them are taken: balanced, by a hash, whatever their order
           Pair, Sample
paper      the 61 tasks of Gao et al. 2024, table 1
           TASKS, Task, table
builder    the tasks -> a folder
           build, Report
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
