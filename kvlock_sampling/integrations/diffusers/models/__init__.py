"""Diffusers pipelines as models to edit with: one family a file, and `load` for all of them."""
