"""What the command line says, and how: errors and warnings without their code, progress, decibels."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..types import KVLockError

out, err = Console(), Console(stderr=True)


@contextmanager
def readable() -> Iterator[None]:
    """Errors a user caused are printed as they were written, without a traceback; exit code 2. Warnings likewise."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except (KVLockError, OSError) as error:
        err.print("[bold red]error:[/]", end=" ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except Exception as error:
        torch = sys.modules.get("torch")  # whoever ran out of its memory has imported it
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        err.print(
            f"[bold red]error:[/] out of memory: {str(error).splitlines()[0]}\n"
            "  Less at a time: --offload model or group, --dtype bfloat16, fewer --frames, a smaller --size."
        )
        raise typer.Exit(2) from None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning without the line of code that gave it: here nobody wrote that line."""
    err.print("[bold yellow]warning:[/]", end=" ")
    err.print(str(message), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar of `total` parts, gone afterwards; what is yielded advances it by one, whatever it is called with."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda *_: bar.advance(task)


def decibels(psnr: Any) -> str:
    """A PSNR in words; metrics stop at 100 dB."""
    return "exact" if float(psnr) >= 100 else f"{float(psnr):.1f} dB"
