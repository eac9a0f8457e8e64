"""The command `kvlock`: the demo, edits of your own clips, batches, calibration, and lists of presets and samplers."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from ..types import KVLockError
from ..utils.fields import check_seed

app = typer.Typer(
    help="Lock the background of a video edit to its source, by the variance of the denoising prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)

Model = Annotated[str, typer.Option(help="'tiny', a folder of its weights, or of a diffusers pipeline.")]
Sampler = Annotated[str, typer.Option(help="A name from `kvlock samplers`.")]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps; dpm_adaptive chooses its own.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Dtype = Annotated[str | None, typer.Option(help="Precision of a pipeline's weights: float32, bfloat16, float16.")]
Offload = Annotated[str, typer.Option(help="none; model: one network on the device at a time; group: one layer.")]
Policy = Annotated[str, typer.Option(help="A preset's name or a TOML file; see `kvlock policies`.")]
CFGScale = Annotated[float | None, typer.Option(help="Guidance scale; default: the model's.")]
Strength = Annotated[float, typer.Option(min=0.05, max=1.0, help="1 = from noise; less keeps the clip.")]
Scale = Annotated[int | None, typer.Option(min=1, help="Enlarge the output; default: 4 for 'tiny', else 1.")]
Frames = Annotated[int | None, typer.Option(min=1, help="How many, picked evenly; default: the first ones.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, e.g. 480x832; default: about the clip's.")]
TileVAE = Annotated[bool, typer.Option("--tile-vae", help="Encode and decode in tiles: less memory.")]
NegativePrompt = Annotated[str | None, typer.Option(help="The unconditional prompt; for pipelines.")]
Shift = Annotated[float | None, typer.Option(help="Flow shift, in place of the pipeline's own.")]
KVCacheDir = Annotated[str | None, typer.Option(metavar="DIR", help="Keep the source's K/V for later edits.")]


def _version(asked: bool) -> None:
    if asked:
        out.print(f"kvlock {version('kvlock-sampling')}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Its version.")] = False,
) -> None: ...


@contextmanager
def readable() -> Iterator[None]:
    """Print errors without a traceback and exit with status 2; print warnings without code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say("[bold yellow]warning:[/]", message)
            yield
    except (KVLockError, OSError, torch.OutOfMemoryError) as error:
        from .jobs import message

        _say("[bold red]error:[/]", message(error))
        raise typer.Exit(2) from None


def _say(label: str, message: object) -> None:
    err.print(label, end=" ")
    err.print(str(message), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda *_: bar.advance(task)


def _sides(size: str | None) -> tuple[int, int] | None:
    found = None if size is None else re.fullmatch(r"(\d+)\s*[xX]\s*(\d+)", size.strip())
    if size is not None and found is None:
        raise KVLockError(f"--size {size!r}; expected HEIGHTxWIDTH in pixels, e.g. --size 480x832.")
    return None if found is None else (int(found[1]), int(found[2]))


def _decibels(psnr: Any) -> str:
    return "exact" if float(psnr) >= 100 else f"{float(psnr):.1f} dB"


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Chooses the scenes and the noise.")] = 0,
    steps: Steps = 20,
    sampler: Sampler = "dpmpp_2m",
) -> None:
    """Edit five clips whose true results are known, in three ways; write a picture, a clip, the trace and metrics."""
    with readable():
        from .demo import FILES, VARIANTS, run_demo

        with progress("editing", len(VARIANTS)) as advance:
            metrics = run_demo(out_dir, seed=seed, steps=steps, sampler=sampler, on_variant=advance)
        table = Table("variant", title="Five edits against their true renders (means)", title_justify="left")
        for name in ("whole frame", "in mask", "shadow and light", "nfe", "time"):
            table.add_column(name, justify="right")
        for name, row in metrics.items():
            psnrs = (f"{row[key]:.1f} dB" for key in ("psnr", "inside_psnr", "effect_psnr"))
            table.add_row(name, *psnrs, f"{row['nfe']:.0f}", f"{row['seconds']:.1f} s")
        out.print(table)
        out.print(
            "PSNR against the true render. Shadow and light: outside the mask, where the true edit differs from the "
            "source. nfe: function evaluations (model passes) per clip."
        )
        for name in FILES:
            out.print(f"  {out_dir / name}", highlight=False, soft_wrap=True)


@app.command()
def edit(
    clip: Annotated[Path, typer.Argument(help="mp4, webm, gif, mov, an image, or a folder of images.")],
    mask: Annotated[Path, typer.Option(help="Image or clip; white = edit.")],
    prompt: Annotated[str, typer.Option(help="What the masked region should show.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="mp4, webm, gif or png.")],
    source_prompt: Annotated[str | None, typer.Option(help="What the clip shows now; default: --prompt.")] = None,
    model: Model = "tiny",
    sampler: Sampler = "dpmpp_2m",
    steps: Steps = 30,
    policy: Policy = "default",
    cfg_scale: CFGScale = None,
    strength: Strength = 1.0,
    seed: Seed = 0,
    scale: Scale = None,
    frames: Frames = None,
    size: Size = None,
    dtype: Dtype = None,
    offload: Offload = "none",
    tile_vae: TileVAE = False,
    image: Annotated[Path | None, typer.Option(help="First frame, for image-to-video pipelines.")] = None,
    negative_prompt: NegativePrompt = None,
    shift: Shift = None,
    trace: Annotated[Path | None, typer.Option(help="Also write the run's figure (png, svg, pdf).")] = None,
    kv_cache: KVCacheDir = None,
) -> None:
    """Edit the masked part of a clip after a prompt, and keep the rest."""
    with readable():
        from ..kv_cache import KVCache
        from ..samplers import get
        from ..trace import figure_format
        from ..utils.files import check_writable
        from ..video import check_suffix, read_clip, write_clip
        from .batch import fitting_scale
        from .edit import edit_video
        from .models import open_model, read_pair

        check_suffix(output)
        if any(output.exists() and p.exists() and output.samefile(p) for p in (clip, mask)):
            raise KVLockError(f"-o {output} is an input of this edit and would be overwritten. Name another file.")
        check_writable(output)
        if trace is not None:
            figure_format(trace)
            check_writable(trace)
        get(sampler)
        options: dict[str, Any] = {} if kv_cache is None else {"kv_cache": KVCache(kv_cache)}
        sides = _sides(size)
        video = open_model(
            model, dtype=dtype, offload=offload, tile_vae=tile_vae or None, negative_prompt=negative_prompt, shift=shift
        )
        if video.frames is not None:
            video.prompt([prompt, source_prompt or ""])  # Unknown words raise before any file is read.
        source, region = read_pair(video, clip, mask, frames=frames, size=sides)
        _say("read:", source.note)
        scale = fitting_scale(scale, video, source.pixels)
        if image is not None:
            if not hasattr(video, "starting_from"):
                raise KVLockError(f"--image is for image-to-video pipelines, and --model {model} is not one.")
            _, _, height, width = source.pixels.shape
            video = video.starting_from(read_clip(image, size=(height, width)).pixels[:, 0])
        with progress("sampling", steps) as advance:
            options |= {"source_prompt": source_prompt, "sampler": sampler, "steps": steps, "policy": policy}
            options |= {"cfg_scale": cfg_scale, "strength": strength, "seed": seed, "on_step": advance}
            options["on_plan"] = lambda plan: err.print(str(plan), highlight=False)
            result = edit_video(source.pixels, region.unsqueeze(0), prompt, model=video, **options)
        sound = write_clip(output, result.pixels[0], source.fps, scale, sound=clip)
        if trace is not None:
            result.trace.plot(trace)
        out.print(
            f"{output}: {result.nfe} model passes in {result.seconds:.1f} s; background PSNR: "
            f"{_decibels(result.background_psnr[0])} (ceiling of the codec: {_decibels(result.ceiling_psnr[0])})"
            f"{sound and '; '}{sound}",
            highlight=False,
        )


@app.command()
def batch(
    jobs: Annotated[Path, typer.Argument(help="CSV with columns clip, mask, prompt, and more; an edit a row.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write into; what is done there is kept.")],
    model: Model = "tiny",
    sampler: Sampler = "dpmpp_2m",
    steps: Steps = 30,
    policy: Policy = "default",
    cfg_scale: CFGScale = None,
    strength: Strength = 1.0,
    seed: Seed = 0,
    scale: Scale = None,
    frames: Frames = None,
    size: Size = None,
    dtype: Dtype = None,
    offload: Offload = "none",
    tile_vae: TileVAE = False,
    negative_prompt: NegativePrompt = None,
    shift: Shift = None,
    kv_cache: KVCacheDir = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, on Ray; default: one per GPU, or one.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster: auto, or HOST:PORT.")] = None,
) -> None:
    """Do the edits of a table, each once; the same command goes on after a stop, and does what has changed."""
    with readable():
        from ..kv_cache import KVCache
        from ..presets import load_preset
        from ..samplers import get
        from ..utils.files import check_writable
        from .batch import run_batch
        from .jobs import policy_file, read_jobs
        from .report import write_report

        get(sampler), load_preset(policy), check_seed(seed, KVLockError)
        model = model if model == "tiny" or not Path(model).exists() else str(Path(model).absolute())
        options: dict[str, Any] = {"sampler": sampler, "steps": steps, "cfg_scale": cfg_scale, "seed": seed}
        options |= {"policy": policy_file(policy, Path()), "strength": strength, "scale": scale, "frames": frames}
        cache = None if kv_cache is None else KVCache(kv_cache).directory
        options |= {"size": _sides(size), "source_prompt": None, "kv_cache": cache and str(cache.absolute())}
        loaded: dict[str, Any] = {"model": model, "dtype": dtype, "offload": offload, "shift": shift}
        loaded |= {"tile_vae": tile_vae or None, "negative_prompt": negative_prompt}
        rows = read_jobs(jobs, out_dir.absolute(), options, loaded)
        check_writable(out_dir / "report.html")
        try:
            with progress("editing", len(rows)) as advance:
                records = run_batch(rows, loaded, workers=workers, address=address, on_job=advance)
        except KeyboardInterrupt:
            _say("stopped:", "what is done is kept; the same command does the rest.")
            raise typer.Exit(130) from None
        write_report(out_dir, rows, records)
        numbers = [Column(name, justify="right") for name in ("passes", "time", "background")]
        table = Table("row", "output", "", *numbers)
        for job, record in zip(rows, records, strict=True):
            figures = []
            if record["status"] != "failed":
                figures = [str(record["nfe"]), f"{record['seconds']:.1f} s", _decibels(record["background_psnr"])]
            table.add_row(str(job.row), escape(job.output.name), record["status"], *figures)
        out.print(table)
        for job, record in zip(rows, records, strict=True):
            for text in [record["error"]] if "error" in record else record["warnings"]:
                _say(f"[bold]row {job.row}:[/]", text)
        kinds = [record["status"] for record in records]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("done", "kept", "failed"))
        out.print(f"{out_dir / 'report.html'}: {counts}", highlight=False, soft_wrap=True)
        if "failed" in kinds:
            raise typer.Exit(1)


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="The preset to write, NAME.toml.")],
    model: Model = "tiny",
    clips: Annotated[str, typer.Option(help="How many scenes; or a folder of NAME.mp4, .mask.png and .txt.")] = "32",
    policy: Annotated[str, typer.Option(help="The policy that the thresholds are for.")] = "sigmoid",
    quantile: Annotated[float, typer.Option(min=0.5, max=0.999, help="Fraction of calm runs below risk 1.")] = 0.95,
    sampler: Sampler = "dpmpp_2m",
    steps: Annotated[int, typer.Option(min=4, help="Sampling steps.")] = 30,
    seed: Seed = 0,
    dtype: Dtype = None,
    offload: Offload = "none",
) -> None:
    """Measure the variance of calm runs at every noise level, and write a preset whose risk is relative to it."""
    with readable():
        from ..presets import to_toml
        from ..samplers import get
        from ..utils.files import check_writable, write_atomically
        from ..variance.thresholds import alarm_range
        from .calibration import calibrate as measure
        from .calibration import folder, scenes
        from .models import open_model

        get(sampler)
        if output.suffix != ".toml":
            raise KVLockError(f"-o {output} is to be a preset; expected a name that ends in .toml, e.g. -o mine.toml.")
        check_writable(output)
        video = open_model(model, dtype=dtype, offload=offload)
        if video.frames is None and clips.isdecimal():
            raise KVLockError(f"--clips {clips} are scenes of the embedded model; {model} needs --clips FOLDER.")
        examples = scenes(int(clips)) if clips.isdecimal() else folder(Path(clips), video)
        batch = 1 if video.frames is None else 8
        with progress("measuring", len(examples)) as advance:
            settings: dict[str, Any] = {"policy": policy, "quantile": quantile, "sampler": sampler, "steps": steps}
            found = measure(video, examples, seed=seed, batch=batch, on_clip=advance, **settings)
        write_atomically(output, to_toml(found.preset))
        table = Table("sigma", f"{quantile:.0%} quantile", "95% interval", "clips", title=str(output))
        for band in found.bands:
            interval = f"{band.low:.3g} to {band.high:.3g}"
            table.add_row(f"{band.sigma:.3g}", f"{band.quantile:.3g}", interval, str(band.clips))
        out.print(table)
        low, high = alarm_range(len(examples), quantile)
        out.print(
            f"False alarms on other clips: at most {1 - quantile:.1%} on average over calibrations; {low:.1%} to "
            f"{high:.1%} in 95 of 100 on {len(examples)} clips."
        )


@app.command()
def policies() -> None:
    """List the presets: name, policy, when to use it."""
    with readable():
        from ..presets import describe

        table = Table("preset", "policy", "about")
        for row in describe():
            table.add_row(*row)
        out.print(table)


@app.command()
def samplers() -> None:
    """List the samplers of the installed k-diffusion."""
    with readable():
        from ..samplers import names

        for name in names():
            out.print(name, highlight=False)
