"""The web page of `kvlock web`: draw a mask, edit, compare, and see what the lock did."""

from ._serve import serve, served

__all__ = ["serve", "served"]
