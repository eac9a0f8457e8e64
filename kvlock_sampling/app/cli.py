"""The command `kvlock`: the demo, edits of your own clips, calibration, and lists of presets and samplers."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..kv_cache import KVCache
from ..presets import _shelf, describe, to_toml
from ..samplers import names
from ..trace import figure_format
from ..types import KVLockError
from ..utils.files import check_writable, write_atomically
from ..variance.thresholds import alarm_range
from ..video import check_suffix, read_clip, side_by_side, write_clip
from ..video.media import files_of
from . import batch_command, plan_command, web_command  # noqa: F401 - they add their commands
from . import command_line as opt
from .batch import fitting_scale
from .calibration import calibrate as measure
from .calibration import folder, scenes
from .command_line import app, decibels, err, out, progress, readable, say, sides_of
from .demo import FILES, VARIANTS, run_demo
from .edit import edit_video
from .jobs import check_outputs, check_run
from .models import open_model, read_pair


def _version(asked: bool) -> None:
    if asked:
        out.print(f"kvlock {version('kvlock-sampling')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", **opt.OUTPUT, help="Replaces six files in it.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Chooses the scenes and the noise.")] = 0,
    steps: opt.Steps = 20,
    sampler: opt.Sampler = "dpmpp_2m",
) -> None:
    """Edit five clips whose true results are known, in three ways; write a picture, a clip, the trace and metrics."""
    with readable():
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
            out.print(f"  {out_dir / name}", soft_wrap=True)


@app.command()
def edit(
    clip: opt.Clip,
    mask: opt.Mask,
    prompt: Annotated[str, typer.Option(help="What the masked region should show.")],
    output: Annotated[Path, typer.Option("-o", "--output", **opt.OUTPUT, help="mp4, mov, webm, gif or png.")],
    source_prompt: Annotated[
        str | None, typer.Option(help="What the clip shows now; default: --prompt, or none with --kv-cache.")
    ] = None,
    model: opt.Model = "tiny",
    sampler: opt.Sampler = "dpmpp_2m",
    steps: opt.Steps = 30,
    policy: opt.Policy = "default",
    cfg_scale: opt.CFGScale = None,
    strength: opt.Strength = 1.0,
    transition: opt.Transition = None,
    seed: opt.Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Try so many from --seed on, shown in OUTPUT-candidates.png.")] = 1,
    scale: opt.Scale = None,
    frames: opt.Frames = None,
    size: opt.Size = None,
    dtype: opt.Dtype = None,
    offload: opt.Offload = "none",
    tile_vae: opt.TileVAE = False,
    image: Annotated[Path | None, typer.Option(**opt.PATH, help="First frame, for image-to-video pipelines.")] = None,
    negative_prompt: opt.NegativePrompt = None,
    shift: opt.Shift = None,
    trace: Annotated[Path | None, typer.Option(**opt.OUTPUT, help="Also write the run's plot (png, svg, pdf).")] = None,
    kv_cache: opt.KVCacheDir = None,
) -> None:
    """Edit the masked part of a clip after a prompt, and keep the rest."""
    with readable():
        check_suffix(output)
        sheet = output.with_name(f"{output.stem}-candidates.png")
        written = [output, *([] if trace is None else [trace]), *([sheet] if seeds > 1 else [])]
        check_outputs(written, [path for path in (clip, mask, image) if path is not None])
        if trace is not None:
            figure_format(trace)
        for path in written:
            check_writable(path)
        for path in (clip, mask, *([image] if image else [])):
            files_of(path)  # raises before a large model is loaded
        known: dict[str, Any] = {"cfg_scale": cfg_scale, "transition": transition}
        check_run(sampler, policy, seed, prompt=prompt, **known)
        options: dict[str, Any] = {} if kv_cache is None else {"kv_cache": KVCache(kv_cache)}
        sides = sides_of(size)
        video = open_model(
            model, dtype=dtype, offload=offload, tile_vae=tile_vae or None, negative_prompt=negative_prompt, shift=shift
        )
        if video.frames is not None:
            video.prompt([prompt, source_prompt or ""])  # Unknown words raise before any file is read.
        source, region = read_pair(video, clip, mask, frames=frames, size=sides)
        say("read:", source.note)
        scale = fitting_scale(scale, video, source.pixels)
        if image is not None:
            if not hasattr(video, "image"):
                raise KVLockError(f"--image is for image-to-video pipelines, and --model {model} is not one.")
            _, _, height, width = source.pixels.shape
            video.image = read_clip(image, frames=1, size=(height, width)).pixels[:, 0]
        with progress("sampling", steps) as advance:
            options |= {"source_prompt": source_prompt, "sampler": sampler, "steps": steps, "policy": policy}
            options |= {**known, "strength": strength, "seed": seed, "candidates": seeds, "on_step": advance}
            options["on_plan"] = lambda plan: err.print(str(plan), markup=False)
            result = edit_video(source.pixels, region.unsqueeze(0), prompt, model=video, **options)
        sound = write_clip(output, result.pixels[0], source.fps, scale, sound=clip)
        out.print(
            f"{output}: {result.nfe} model passes in {result.seconds:.1f} s; background PSNR: "
            f"{decibels(result.background_psnr[0])} (ceiling of the codec: {decibels(result.ceiling_psnr[0])})"
            f"{sound and '; '}{sound}",
            soft_wrap=True,
        )
        if result.candidates is not None:
            names = [f"seed {seed + i}{' (chosen)' * (seed + i == result.seed)}" for i in range(seeds)]
            middle = result.candidates[:, :, result.candidates.shape[2] // 2].unsqueeze(2)
            write_clip(sheet, side_by_side(list(middle), names, scale=max(1, scale)))
            out.print(f"{sheet}: seed {result.seed} of {seed} to {seed + seeds - 1} was finished", soft_wrap=True)
        if trace is not None:
            result.trace.plot(trace)


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", **opt.OUTPUT, help="The preset to write, NAME.toml.")],
    model: opt.Model = "tiny",
    clips: Annotated[str, typer.Option(**opt.TEXT, help="How many; or a folder: NAME.mp4, .mask.png, .txt.")] = "32",
    policy: Annotated[str, typer.Option(help="The policy that the thresholds are for.")] = "sigmoid",
    quantile: Annotated[float, typer.Option(min=0.5, max=0.999, help="Fraction of calm runs below risk 1.")] = 0.95,
    sampler: opt.Sampler = "dpmpp_2m",
    steps: Annotated[int, typer.Option(min=4, max=opt.MOST_STEPS, help="Sampling steps.")] = 30,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = None,
    offload: opt.Offload = "none",
) -> None:
    """Measure the variance of calm runs at every noise level, and write a preset whose risk is relative to it."""
    with readable():
        check_run(sampler, policy, seed)
        if output.suffix != ".toml":
            raise KVLockError(f"-o {output} is to be a preset; expected a name that ends in .toml, e.g. -o mine.toml.")
        check_outputs([output], [_shelf().get(policy, Path(policy).expanduser())])
        check_writable(output)
        count = clips.isdecimal() and not Path(clips).is_dir()
        video = open_model(model, dtype=dtype, offload=offload)
        if video.frames is None and count:
            raise KVLockError(f"--clips {clips} are scenes of the embedded model; {model} needs --clips FOLDER.")
        examples = scenes(int(clips)) if count else folder(clips, video)
        with progress("measuring", len(examples)) as advance:
            settings: dict[str, Any] = {"policy": policy, "quantile": quantile, "sampler": sampler, "steps": steps}
            found = measure(video, examples, seed=seed, on_clip=advance, **settings)
        table = Table("sigma", f"{quantile:.0%} quantile", "95% interval", "clips", title=str(output))
        for b in found.bands:
            table.add_row(f"{b.sigma:.3g}", f"{b.quantile:.3g}", f"{b.low:.3g} to {b.high:.3g}", str(b.clips))
        out.print(table)
        low, high = alarm_range(len(examples), quantile)
        out.print(
            f"False alarms on other clips: at most {1 - quantile:.1%} on average over calibrations; {low:.1%} to "
            f"{high:.1%} in 95 of 100 on {len(examples)} clips."
        )
        write_atomically(output, to_toml(found.preset))  # last, for the disk may be full


@app.command()
def policies() -> None:
    """List the presets: name, policy, when to use it."""
    with readable():
        table = Table("preset", "policy", "about")
        for name, kind, about in (rows := describe()):
            table.add_row(name, kind, "" if kind == "error" else about)
        wrong = [about for _, kind, about in rows if kind == "error"]
        out.print(table)
        for text in wrong:
            say("[bold red]error:[/]", text)
        raise typer.Exit(2 if wrong else 0)


@app.command()
def samplers() -> None:
    """List the samplers of the installed k-diffusion."""
    with readable():
        for name in names():
            out.print(name)
