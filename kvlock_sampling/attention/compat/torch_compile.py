"""Compiled models under a lock: calls run without the compiler if a graph cannot break at the hooks."""

import sys
from collections.abc import Callable
from typing import TypeVar

from ...utils.threads import compiler_imported, without_compiler
from ...utils.warn import warn

T = TypeVar("T")


def call_compiled(call: Callable[[], T], acted: Callable[[], bool]) -> tuple[T, bool]:
    """Make a call whose compiled code must break at hooks; if no hook `acted`, repeat it uncompiled, with a warning.

    Returns the result, and whether the compiler must be left out from now on.
    """
    try:
        result = call()
        if acted() or not compiler_imported():
            return result, False
        why = "a lock cannot reach into the compiled model"
    except Exception as error:
        if not _refuses_to_break(error):
            raise
        why = "the code around the lock is compiled, or the model so that it must not break (fullgraph=True)"
    with without_compiler():
        result = call()
    if not acted():
        return result, False
    warn(
        f"{why}, so evaluations that lock run without torch.compile: the same result, at uncompiled speed.\n"
        "  Allow graph breaks, with model.compile_repeated_blocks() or torch.compile(model) without fullgraph=True: "
        "then only the locked attention runs uncompiled.",
    )
    return result, True


def _refuses_to_break(error: BaseException) -> bool:
    exceptions = getattr(sys.modules.get("torch._dynamo"), "exc", None)
    # If the graph consists of the break alone, the compiler raises a plain RuntimeError.
    alone = type(error) is RuntimeError and "fullgraph=True" in str(error)
    return exceptions is not None and (alone or isinstance(error, exceptions.TorchDynamoException))
