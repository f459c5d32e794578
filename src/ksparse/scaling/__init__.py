"""Scaling laws of SAEs, from the grid of runs to the fitted law.

sweeps   a grid of recipes: training its runs, and collecting their points
laws     points to laws: fit, compare, predict
"""
