"""The built-in language model: a small causal LM of Python source, with its text and training log.

folder("7.6m")          the Hugging Face folder of one size, inside the package
SIZES                   the available sizes, smallest first; DEFAULT has the lowest held-out loss
documents("held-out")   the standard library of the running interpreter, as (name, text)
loss_table(folder)      [(FLOPs, loss)] over training, to express a loss as compute
"""

from ksparse.pylm.model import DEFAULT, SIZES, folder, loss_table
from ksparse.pylm.text import SPLITS, documents

__all__ = ["DEFAULT", "SIZES", "SPLITS", "documents", "folder", "loss_table"]
