"""Training: a recipe in, a run folder out.

train         `train` and `train_many`: read these first
trainer       one SAE in training
resume        continuing a run: the protocol, and reading checkpoints
checkpoint    writing checkpoints
source        where activations come from
steps         the ways to compute an update, and which one to take
convergence   the held-out loss along a run
resample      new rows for dead latents
monitor       warnings about anomalies
loggers       TensorBoard, wandb and trackio
"""
