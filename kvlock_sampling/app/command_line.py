"""What the commands share: the command line itself, its consoles, errors and progress."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..types import KVLockError

app = typer.Typer(
    help="Lock the background of a video edit to its source, by the variance of the denoising prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)


@contextmanager
def readable() -> Iterator[None]:
    """Print errors without a traceback and exit with status 2; print warnings without code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say("[bold yellow]warning:[/]", message)
            yield
    except (KVLockError, OSError, torch.OutOfMemoryError) as error:
        from .jobs import message

        say("[bold red]error:[/]", message(error))
        raise typer.Exit(2) from None


def say(label: str, message: object) -> None:
    err.print(label, end=" ")
    err.print(str(message), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda *_: bar.advance(task)


def sides_of(size: str | None) -> tuple[int, int] | None:
    found = None if size is None else re.fullmatch(r"(\d+)\s*[xX]\s*(\d+)", size.strip())
    if size is not None and found is None:
        raise KVLockError(f"--size {size!r}; expected HEIGHTxWIDTH in pixels, e.g. --size 480x832.")
    return None if found is None else (int(found[1]), int(found[2]))


def decibels(psnr: Any) -> str:
    return "exact" if float(psnr) >= 100 else f"{float(psnr):.1f} dB"
