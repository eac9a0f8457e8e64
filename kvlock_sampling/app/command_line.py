"""What the commands share: the command line itself, options, its consoles, errors and progress."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..types import KVLockError
from .edit import LEAST_STRENGTH, MOST_STEPS
from .jobs import message

app = typer.Typer(
    help="Lock the background of a video edit to its source, by the variance of the denoising prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be of another encoding
out, err = Console(markup=False, emoji=False, highlight=False), Console(stderr=True, emoji=False, highlight=False)


# The path of "" would be a folder, and a shell leaves the ~ of --out=~/edits.
PATH: dict[str, Any] = {"parser": lambda path: Path(os.path.expanduser(path or "(no name)")), "metavar": "PATH"}
OUTPUT: dict[str, Any] = {"parser": lambda path: Path(os.path.expanduser(path)), "metavar": "PATH"}
Clip = Annotated[Path, typer.Argument(**PATH | {"metavar": "CLIP"}, help="mp4, mkv, gif, ..., image or image folder.")]
Mask = Annotated[Path, typer.Option(**PATH, help="Image or clip; white = edit.")]
TEXT: dict[str, Any] = {"parser": os.path.expanduser, "metavar": "TEXT"}
Model = Annotated[str, typer.Option(**TEXT, help="'tiny', a folder of its weights, or of a diffusers pipeline.")]
Sampler = Annotated[str, typer.Option(help="A name from `kvlock samplers`.")]
Steps = Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Sampling steps; dpm_adaptive chooses its own.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16 on a GPU.")]
Offload = Annotated[str, typer.Option(help="none; model: one network on the device at a time; group: one layer.")]
Policy = Annotated[str, typer.Option(help="A preset's name or a TOML file; see `kvlock policies`.")]
CFGScale = Annotated[float | None, typer.Option(help="Guidance scale; default: the model's.")]
Strength = Annotated[float, typer.Option(min=LEAST_STRENGTH, max=1.0, help="1 = from noise; less keeps the clip.")]
Transition = Annotated[tuple[float, float] | None, typer.Option(help="Width in tokens, and its part of the lock.")]
Scale = Annotated[int | None, typer.Option(min=1, help="Enlarge the output; default: 4 for 'tiny', else 1.")]
Frames = Annotated[int | None, typer.Option(min=1, help="How many, picked evenly; default: the first; 'tiny': 8.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, e.g. 480x832; default: about the clip's.")]
TileVAE = Annotated[bool, typer.Option("--tile-vae", help="Encode and decode in tiles: less memory.")]
NegativePrompt = Annotated[str | None, typer.Option(help="The unconditional prompt; for pipelines.")]
Shift = Annotated[float | None, typer.Option(help="Flow shift, in place of the pipeline's own.")]
KVCacheDir = Annotated[str | None, typer.Option(metavar="DIR", help="Keep the source's K/V for later edits.")]


@contextmanager
def readable() -> Iterator[None]:
    """Print errors without a traceback and exit with status 2; print warnings without code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say("[bold yellow]warning:[/]", message)
            yield
    except (KVLockError, OSError, torch.OutOfMemoryError) as error:
        say("[bold red]error:[/]", message(error))
        raise typer.Exit(2) from None


def say(label: str, message: object) -> None:  # Labels alone are markup, names of files are not.
    err.print(label, end=" ")
    err.print(str(message), markup=False, soft_wrap=True)


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
