"""What belongs to one thread or task, and what all of them share."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_mark: ContextVar[None] = ContextVar("kvlock_here")


@contextmanager
def setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Inside the block the variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def here() -> Callable[[], bool]:
    """Return a function that tells whether it is called in the thread or task (`contextvars`) that calls this one.

    A task begins with a copy of all values of its origin. But a token resets a variable in its own context alone.
    """
    token = _mark.set(None)

    def is_here() -> bool:
        nonlocal token
        try:
            _mark.reset(token)
        except (ValueError, RuntimeError):  # another context's, which may be asking at this moment
            return False
        token = _mark.set(None)
        return True

    return is_here


def shared(enter: Callable[[ExitStack], None]) -> Callable[[], AbstractContextManager[None]]:
    """A context manager of a state of all threads: the first one in enters it, the last one out undoes it."""
    lock, undo, users = threading.Lock(), ExitStack(), 0

    @contextmanager
    def inside() -> Iterator[None]:
        nonlocal users
        with lock:
            if not users:
                enter(undo)
            users += 1
        try:
            yield
        finally:
            with lock:
                users -= 1
                if not users:
                    undo.close()

    return inside


def compiler_imported() -> bool:
    """Whether the compiler was imported. Without it nothing can be compiled."""
    return "torch._dynamo" in sys.modules


@shared  # the compiler has one stance for all threads
def without_compiler(undo: ExitStack) -> None:
    """Run compiled code uncompiled inside the block."""
    if compiler_imported():
        undo.enter_context(torch.compiler.set_stance("force_eager"))
