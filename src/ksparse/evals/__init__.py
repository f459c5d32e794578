"""Evaluations of sparse autoencoders on held-out text (listed in registry.py)."""
