"""Metrics of single latents: how often they fire, how strongly, and with which others.

moments        firing counts and moments of the values, which other metrics build on
properties     `Latents`: densities, importances, dense, opposite and recurring latents
coactivation   which latents fire on the same tokens
subspaces      whether two groups of latents read separate subspaces
"""
