"""The web page of `kvlock web`: draw a mask, edit, compare, and see what the lock did."""

from ._page import page
from ._serve import serve
from ._session import Sessions

__all__ = ["Sessions", "page", "serve"]
