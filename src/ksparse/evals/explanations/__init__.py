"""Explanations of latents by patterns of tokens (N2G), and how well they predict."""
