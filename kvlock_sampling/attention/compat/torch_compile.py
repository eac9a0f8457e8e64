"""The way out where compiled code cannot be stopped at a door: the same call again, without the compiler."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_users = 0
_stance = ExitStack()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, compiled code runs as it was written.

    The compiler's stance is one for all threads, and each that leaves would put back what it found: so the first one
    in sets it, and the last one out resets it.
    """
    global _users, _stance
    with _lock:
        if not _users:
            _stance = ExitStack()
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _stance.close()


def anything_compiled() -> bool:
    """Whether any function of this process has been through the compiler."""
    utils = getattr(sys.modules.get("torch._dynamo"), "utils", None)
    return utils is not None and bool(utils.counters["frames"])


def refuses_to_stop(error: BaseException) -> bool:
    """Whether the compiler raised this because the graph may not break, or not be compiled another time."""
    exceptions = getattr(sys.modules.get("torch._dynamo"), "exc", None)
    if exceptions is None:
        return False
    # Of a graph that would be nothing but the break the compiler complains without a class of its own.
    return isinstance(error, exceptions.TorchDynamoException) or (
        type(error) is RuntimeError and "fullgraph=True" in str(error)
    )


def warn_uncompiled(why: str) -> None:
    """Say that locked evaluations do not profit from compilation, and what would change that."""
    warnings.warn(
        f"{why}, so evaluations that lock run without torch.compile: the same result, at the speed of the model as it "
        "was before. Evaluations that do not lock still run compiled.\n"
        "  Compile so that a graph may break, model.compile_repeated_blocks() or torch.compile(model) without "
        "fullgraph=True: then only the locked attention runs outside of it.",
        stacklevel=2,
    )
