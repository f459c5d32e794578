"""The loop: a recipe in, a run folder out.

loop         train(recipe, out): read it top to bottom
optim        learning-rate law and schedule, Adam with its decoder constraint, average of the
             weights
checkpoint   everything needed to go on exactly, committed whole
plan         what a recipe costs before it runs; costs, hardware: the arithmetic of memory,
             communication and time, and cards
loggers      TensorBoard, wandb, trackio beside metrics.jsonl
"""
