"""The built-in probe suite: 61 questions about a token of Python source.

The standard library's own parser answers them, so the labels are exact:

    source -> tokenize, ast, symtable -> marks {name: bool[characters]} -> labels [tokens, 61]

A mark is a set of characters. Each task has a mark under its own name, and each population of
tokens one under its description. A token's label is 1 where both marks are set, 0 where only the
population's is, and -1 elsewhere. Names inside f-strings count as text, not as identifiers, because
Python 3.11 cannot locate them.

    tasks     the questions, and the rules for those that spelling decides
    source    the text, its tokens, and painting marks on characters
    tokens    marks from tokens
    syntax    marks from the syntax tree
    scopes    marks from symbol tables
    labeling  `labels`, which runs them all
"""

from ksparse.evals.probing.python_labels.labeling import labels
from ksparse.evals.probing.python_labels.tasks import TASKS, PythonTask

__all__ = ["TASKS", "PythonTask", "labels"]
