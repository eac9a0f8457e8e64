"""`kvlock plan`: what an edit will cost before it runs."""

from typing import Annotated

import typer
from rich.table import Table

from . import command_line as opt
from .command_line import app, out, progress, readable, say, sides_of


@app.command()
def plan(
    clip: opt.Clip,
    mask: opt.Mask,
    model: opt.Model = "tiny",
    sampler: opt.Sampler = "dpmpp_2m",
    steps: Annotated[int, typer.Option(min=2, max=opt.MOST_STEPS, help="Sampling steps.")] = 30,
    frames: opt.Frames = None,
    size: opt.Size = None,
    dtype: opt.Dtype = None,
    offload: opt.Offload = "none",
) -> None:
    """Tell passes, time and memory of an edit for each way of locking, from two evaluations of the model."""
    with readable():
        from ..kv_cache.memory import readable as size_of
        from ..samplers import get
        from .costs import WAYS, costs
        from .models import open_model, read_pair

        get(sampler)
        video = open_model(model, dtype=dtype, offload=offload)
        source, region = read_pair(video, clip, mask, frames=frames, size=sides_of(size))
        say("read:", source.note)
        found = []
        with progress("measuring", len(WAYS) + 1) as advance:
            for cost in costs(video, source.pixels[None], region[None], sampler=sampler, steps=steps):
                found.append(cost)
                advance()
        table = Table("policy")
        for name in ("passes", "time", "to off", "tokens", "peak memory", "KV cache"):
            table.add_column(name, justify="right", overflow="fold")
        for cost in found:
            peak = "" if cost.peak is None else size_of(cost.peak)
            ratio = f"{cost.seconds / found[0].seconds:.2f}"
            cells = (f"{cost.seconds:.1f} s", ratio, f"{cost.computed:.0%}", peak, size_of(cost.stored))
            table.add_row(cost.way, str(cost.passes), *cells)
        out.print(table)
        out.print(
            "Time of sampling alone, from two evaluations in the middle of the schedule. default takes up to one "
            "pass more where it lets the background go. tokens: those the edit's passes run on."
        )
