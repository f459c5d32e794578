"""Probes: how well single latents predict the labels of known features (Gao et al. 2024, eq. 4).

probes          `Probes`: the metric
tasks           labelled text to labelled activations
logistic        logistic regression, thousands of one-dimensional fits at once
python_labels   the built-in suite: questions about tokens of Python source
suites          suites of labelled texts on disk, and how to build the paper's
"""
