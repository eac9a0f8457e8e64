"""Warnings that name the line of the user's own script, however deep in the library they arise."""

import inspect
import warnings

_PASSED_OVER = {__name__.partition(".")[0], "k_diffusion", "torch", "contextlib", "diffusers", "accelerate"}


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither this library's nor of what it is called through."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PASSED_OVER:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
