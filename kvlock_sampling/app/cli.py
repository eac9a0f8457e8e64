"""`kvlock`: the demo, edits of your own clips, and what is on the shelf."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..types import KVLockError
from .console import decibels, err, out, progress, readable

app = typer.Typer(
    help="Lock the background of a video edit to its source, by the variance of the denoising prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _size(text: str | None) -> tuple[int, int] | None:
    """ "480x832" as (height, width)."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)\s*[xX]\s*(\d+)", text.strip())
    if found is None:
        raise KVLockError(f"--size {text!r}; expected HEIGHTxWIDTH in pixels, e.g. --size 480x832.")
    return int(found[1]), int(found[2])


def _bank(folder: str | None, memory: str | None, disk: str | None) -> dict[str, Any]:
    """The KV cache of an edit as an option of it, or none. What it may use means nothing without one."""
    given = {"--kv-cache-memory": memory, "--kv-cache-disk": disk}
    if folder is None:
        for name, size in given.items():
            if size is not None:
                raise KVLockError(
                    f"{name} {size} is for a KV cache, and there is none; name its folder: --kv-cache kv-bank {name} {size}."
                )
        return {}
    from ..kv_cache import KVCache
    from ..kv_cache.sizes import parse_bytes

    for name, size in given.items():
        parse_bytes(size, name)  # named as it was written
    return {"kv_cache": KVCache(folder, budget=memory or "4GB", disk=disk)}


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Which scenes and which noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 30,
    sampler: Annotated[str, typer.Option(help="Any name of `kvlock samplers`.")] = "dpmpp_2m",
) -> None:
    """Edit three clips with known right answers in five ways; write a side-by-side clip, a figure and a table."""
    with readable():
        from ..tiny.compare import DEMO_VARIANTS
        from .demo import run_demo

        with progress("editing", len(DEMO_VARIANTS)) as advance:
            result = run_demo(out_dir, seed=seed, steps=steps, sampler=sampler, on_variant=advance)
        table = Table(title="Three edits against their true renders (means)", title_justify="left")
        table.add_column("variant", no_wrap=True)
        for name in ("background", "SSIM", "in mask", "colour", "shape", "passes", "time"):  # fits 80 columns
            table.add_column(name, justify="right")
        for name, score in result.scores.items():
            row = score.summary()
            table.add_row(
                name,
                f"{row['background_psnr']:.1f} dB",
                f"{row['background_ssim']:.3f}",
                f"{row['inside_psnr']:.1f} dB",
                f"{row['colour']:.0%}",
                f"{row['shape']:.0%}",
                str(int(row["evaluations"])),
                f"{row['seconds']:.1f} s",
            )
        out.print(table)
        out.print(
            "Background and in mask: PSNR against the true render, higher is better; a background of 100 dB is exact, "
            "since this model has no VAE. Colour, shape: share of clips in which they came out right. Passes: of the "
            "model, per clip."
        )
        out.print(f"Done in {result.seconds:.0f} s. Look at:")
        for path in result.files:
            out.print(f"  {path}", highlight=False, soft_wrap=True)


@app.command()
def edit(
    clip: Annotated[Path, typer.Argument(help="mp4, webm, gif, mov, an image, or a folder of images.")],
    mask: Annotated[Path, typer.Option(help="Image or clip; white = edit.")],
    prompt: Annotated[str, typer.Option(help="What the masked region shall show.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="mp4, webm, gif or png.")],
    source_prompt: Annotated[
        str | None, typer.Option(help="What the clip shows now, read by the source's own branch; default: --prompt.")
    ] = None,
    model: Annotated[str, typer.Option(help="'tiny', a folder of its weights, or of a diffusers pipeline.")] = "tiny",
    sampler: Annotated[str, typer.Option(help="Any name of `kvlock samplers`.")] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps; dpm_adaptive chooses its own.")] = 30,
    policy: Annotated[str, typer.Option(help="A preset's name or a TOML file; see `kvlock policies`.")] = "default",
    cfg_scale: Annotated[float | None, typer.Option(help="Guidance; default: the model's.")] = None,
    strength: Annotated[
        float, typer.Option(min=0.05, max=1.0, help="1 = start from noise; less keeps more of the clip.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    scale: Annotated[
        int | None,
        typer.Option(min=1, help="Enlarge the written clip by a whole factor; default: 8 for 'tiny', otherwise 1."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="How many, picked evenly; default: the first ones, as many as the model makes."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH to edit at, e.g. 480x832; default: about the clip's.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of a pipeline's weights: float32, bfloat16, float16.")
    ] = None,
    offload: Annotated[
        str, typer.Option(help="none; model: one network on the device at a time; group: one layer at a time.")
    ] = "none",
    tile_vae: Annotated[bool, typer.Option("--tile-vae", help="Encode and decode in tiles: less memory.")] = False,
    image: Annotated[Path | None, typer.Option(help="First frame, for image-to-video pipelines.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from; for pipelines.")] = None,
    shift: Annotated[float | None, typer.Option(help="Flow shift, in place of the pipeline's own.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Also write the run's figure (png, svg, pdf).")] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Keeps the source's K/V there: the next edit of this clip is cheap."),
    ] = None,
    bank_memory: Annotated[str | None, typer.Option(help="Memory the KV cache may use; default: 4GB.")] = None,
    bank_disk: Annotated[
        str | None, typer.Option(help="Bytes its folder may take, e.g. 50GB; default: no limit.")
    ] = None,
) -> None:
    """Edit the masked part of a clip after a prompt, and keep the rest."""
    with readable():
        from ..plot import figure_format
        from ..samplers import get
        from ..utils.files import check_writable
        from ..video.files import check_suffix, read_clip, write_clip
        from .edit import edit_video
        from .inputs import read_pair
        from .models import open_model

        check_suffix(output)
        if any(output.exists() and p.exists() and output.samefile(p) for p in (clip, mask)):
            raise KVLockError(f"-o {output} is an input of this edit and would be overwritten. Name another file.")
        check_writable(output)
        if trace is not None:
            figure_format(trace)
            check_writable(trace)
        get(sampler)
        options = _bank(kv_cache, bank_memory, bank_disk)
        sides = _size(size)
        video = open_model(
            model, dtype=dtype, offload=offload, tile_vae=tile_vae or None, negative_prompt=negative_prompt, shift=shift
        )
        if model_is_tiny := video.frames is not None:
            video.prompt([prompt, source_prompt or ""])  # its few words are known; a wrong one is told before anything
        source, region = read_pair(video, clip, mask, frames=frames, size=sides)
        if image is not None:
            if not hasattr(video, "starting_from"):
                raise KVLockError(f"--image is for image-to-video pipelines, and --model {model} is none.")
            _, _, height, width = source.pixels.shape
            video = video.starting_from(read_clip(image, size=(height, width)).pixels[:, 0])
        with progress("sampling", steps) as advance:
            result = edit_video(
                source.pixels,
                region.unsqueeze(0),
                prompt,
                source_prompt=source_prompt,
                model=video,
                sampler=sampler,
                steps=steps,
                policy=policy,
                cfg_scale=cfg_scale,
                strength=strength,
                seed=seed,
                on_step=advance,
                on_plan=lambda plan: err.print(str(plan), highlight=False),
                **options,
            )
        write_clip(output, result.pixels[0], fps=source.fps, scale=scale or (8 if model_is_tiny else 1))
        if trace is not None:
            result.trace.plot(trace)
        out.print(
            f"{output}: {result.evaluations} model passes in {result.seconds:.1f} s; background PSNR: "
            f"{decibels(result.background_psnr[0])} (ceiling of the codec: {decibels(result.ceiling_psnr[0])})",
            highlight=False,
        )


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="The preset to write, NAME.toml.")],
    model: Annotated[str, typer.Option(help="'tiny', a folder of its weights, or of a diffusers pipeline.")] = "tiny",
    clips: Annotated[
        str,
        typer.Option(help="How many scenes of the embedded world, or a folder of NAME.mp4, NAME.mask.png, NAME.txt."),
    ] = "32",
    policy: Annotated[str, typer.Option(help="The policy the thresholds are for.")] = "default",
    quantile: Annotated[float, typer.Option(min=0.5, max=0.999, help="Share of calm runs below risk 1.")] = 0.95,
    sampler: Annotated[str, typer.Option(help="Any name of `kvlock samplers`.")] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(min=4, help="Sampling steps.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of a pipeline's weights: float32, bfloat16, float16.")
    ] = None,
    offload: Annotated[str, typer.Option(help="none, model, or group; see `kvlock edit --help`.")] = "none",
) -> None:
    """Measure what calm runs reach at every noise level, and write a preset whose risk is relative to that."""
    with readable():
        from ..presets import save_policy
        from ..samplers import get
        from ..utils.files import check_writable
        from .calibrate import calibrate as measure
        from .calibrate import folder, scenes
        from .models import open_model

        get(sampler)
        check_writable(output)
        video = open_model(model, dtype=dtype, offload=offload)
        if video.frames is None and clips.isdecimal():
            raise KVLockError(f"--clips {clips} are scenes of the embedded model; {model} needs --clips FOLDER.")
        examples = scenes(int(clips)) if clips.isdecimal() else folder(Path(clips), video)
        with progress("measuring", len(examples)) as advance:
            found = measure(
                video,
                examples,
                policy=policy,
                quantile=quantile,
                sampler=sampler,
                steps=steps,
                seed=seed,
                batch=1 if video.frames is None else 8,
                on_clip=advance,
            )
        save_policy(found.preset, output)
        table = Table("sigma", f"{quantile:.0%} quantile", "95% interval", "measurements", title=str(output))
        for band in found.bands:
            interval = f"{band.low:.3g} to {band.high:.3g}"
            table.add_row(f"{band.sigma:.3g}", f"{band.quantile:.3g}", interval, str(band.measurements))
        out.print(table)


@app.command()
def policies(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """List the presets: name, policy, when to use it."""
    with readable():
        from ..presets import describe

        rows = describe()
        if as_json:
            out.print_json(json.dumps([dict(zip(("name", "policy", "about"), row, strict=True)) for row in rows]))
            return
        table = Table("preset", "policy", "about")
        for row in rows:
            table.add_row(*row)
        out.print(table)


@app.command()
def samplers() -> None:
    """List the samplers of the installed k-diffusion."""
    with readable():
        from ..samplers import names

        for name in names():
            out.print(name, highlight=False)


if __name__ == "__main__":
    app()
