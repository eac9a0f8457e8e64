"""Options that several commands take."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="'tiny', a folder of its weights, or of a diffusers pipeline.")]
Sampler = Annotated[str, typer.Option(help="A name from `kvlock samplers`.")]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps; dpm_adaptive chooses its own.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Dtype = Annotated[str | None, typer.Option(help="Precision of a pipeline's weights: float32, bfloat16, float16.")]
Offload = Annotated[str, typer.Option(help="none; model: one network on the device at a time; group: one layer.")]
Policy = Annotated[str, typer.Option(help="A preset's name or a TOML file; see `kvlock policies`.")]
CFGScale = Annotated[float | None, typer.Option(help="Guidance scale; default: the model's.")]
Strength = Annotated[float, typer.Option(min=0.05, max=1.0, help="1 = from noise; less keeps the clip.")]
Transition = Annotated[tuple[float, float] | None, typer.Option(help="Tokens this near take this part of the lock.")]
Scale = Annotated[int | None, typer.Option(min=1, help="Enlarge the output; default: 4 for 'tiny', else 1.")]
Frames = Annotated[int | None, typer.Option(min=1, help="How many, picked evenly; default: the first ones.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, e.g. 480x832; default: about the clip's.")]
TileVAE = Annotated[bool, typer.Option("--tile-vae", help="Encode and decode in tiles: less memory.")]
NegativePrompt = Annotated[str | None, typer.Option(help="The unconditional prompt; for pipelines.")]
Shift = Annotated[float | None, typer.Option(help="Flow shift, in place of the pipeline's own.")]
KVCacheDir = Annotated[str | None, typer.Option(metavar="DIR", help="Keep the source's K/V for later edits.")]
