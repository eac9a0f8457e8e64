"""`kvlock batch`: the edits of a table."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from . import command_line as opt
from .command_line import app, decibels, out, progress, readable, say, sides_of


@app.command()
def batch(
    jobs: Annotated[
        Path, typer.Argument(**opt.PATH, help="CSV with columns clip, mask, prompt, and more; an edit a row.")
    ],
    out_dir: Annotated[
        Path, typer.Option("--out", **opt.OUTPUT, help="Folder to write into; what is done there is kept.")
    ],
    model: opt.Model = "tiny",
    sampler: opt.Sampler = "dpmpp_2m",
    steps: opt.Steps = 30,
    policy: opt.Policy = "default",
    cfg_scale: opt.CFGScale = None,
    strength: opt.Strength = 1.0,
    seed: opt.Seed = 0,
    scale: opt.Scale = None,
    frames: opt.Frames = None,
    size: opt.Size = None,
    dtype: opt.Dtype = None,
    offload: opt.Offload = "none",
    tile_vae: opt.TileVAE = False,
    negative_prompt: opt.NegativePrompt = None,
    shift: opt.Shift = None,
    kv_cache: opt.KVCacheDir = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, on Ray; default: one per GPU, or one.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster: auto, or HOST:PORT.")] = None,
) -> None:
    """Do the edits of a table, each once; the same command goes on after a stop, and does what has changed."""
    with readable():
        from ..kv_cache import KVCache
        from ..utils.files import check_writable
        from .batch import run_batch
        from .jobs import check_outputs, check_run, policy_file, read_jobs
        from .report import check_report, told, write_report

        check_run(sampler, policy, seed, cfg_scale=cfg_scale)
        model = model if model == "tiny" or not Path(model).exists() else str(Path(model).absolute())
        options: dict[str, Any] = {"sampler": sampler, "steps": steps, "cfg_scale": cfg_scale, "seed": seed}
        options |= {"policy": policy_file(policy, Path()), "strength": strength, "scale": scale, "frames": frames}
        cache = None if kv_cache is None else KVCache(kv_cache).directory
        options |= {"size": sides_of(size), "source_prompt": None, "kv_cache": cache and str(cache.absolute())}
        loaded: dict[str, Any] = {"model": model, "dtype": dtype, "offload": offload, "shift": shift}
        loaded |= {"tile_vae": tile_vae or None, "negative_prompt": negative_prompt}
        check_outputs([out_dir / "results.csv", out_dir / "report.html"], [jobs])
        check_report(out_dir)
        rows = read_jobs(jobs, out_dir.absolute(), options, loaded)
        check_writable(out_dir / "report.html")
        try:
            with progress("editing", len(rows)) as advance:
                records = run_batch(rows, loaded, workers=workers, address=address, on_job=advance)
        except KeyboardInterrupt:
            say("stopped:", "what is done is kept; the same command does the rest.")
            raise typer.Exit(130) from None
        numbers = [Column(name, justify="right", overflow="fold") for name in ("passes", "time", "background")]
        table = Table("row", Column("output", overflow="fold"), "", *numbers)
        for job, record in zip(rows, records, strict=True):
            figures = []
            if record["status"] != "failed":
                figures = [str(record["nfe"]), f"{record['seconds']:.1f} s", decibels(record["background_psnr"])]
            table.add_row(str(job.row), job.output.name, record["status"], *figures)
        out.print(table)
        for job, record in zip(rows, records, strict=True):
            for text in told(record):
                say(f"[bold]row {job.row}:[/]", text)
        write_report(out_dir, rows, records)  # last, for the disk may be full
        kinds = [record["status"] for record in records]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("done", "kept", "failed"))
        out.print(f"{out_dir / 'report.html'}: {counts}", soft_wrap=True)
        if "failed" in kinds:
            raise typer.Exit(1)
