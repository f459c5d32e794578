"""Sweeps: a grid of recipes in, the points that laws are fitted to out.

grid      sweep.toml to recipes, each with a run folder
run       training the unfinished runs of a sweep
launch    worker processes on this machine, or jobs of a cluster
collect   finished runs to points.csv and curves.csv
"""
