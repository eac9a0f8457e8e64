"""`kvlock web`: the page in a browser."""

from typing import Annotated

import typer

from . import command_line as opt
from .command_line import app, out, readable


@app.command()
def web(
    model: opt.Model = "tiny",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page on this machine.")] = 7860,
    dtype: opt.Dtype = None,
    offload: opt.Offload = "none",
) -> None:
    """Serve a page to draw a mask, edit, compare policies and see what the lock did. Ctrl-C ends it."""
    with readable():
        from .web import serve

        say = lambda address: out.print(f"{address}  (this machine only; Ctrl-C ends it)", highlight=False)  # noqa: E731
        serve(model, port, on_start=say, dtype=dtype, offload=offload)
