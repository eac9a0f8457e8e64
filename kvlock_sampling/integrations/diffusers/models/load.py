"""The families of pipelines: `from_pipeline`, and `load_pipeline` for a folder. Nothing is downloaded."""

import difflib
import inspect
import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ....types import PipelineError
from ....utils.extras import require
from ....utils.tables import nearest
from ....utils.warn import warn
from .base import PipelineVideo
from .cogvideox import CogVideoXVideo
from .hunyuan import Hunyuan15Video, HunyuanVideo
from .ltx import LTXVideo
from .mochi import MochiVideo
from .wan import WanImageVideo, WanVaceVideo, WanVideo

Offload = Literal["none", "model", "group"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model_index.json"

FAMILIES: dict[str, type[PipelineVideo]] = {
    "WanPipeline": WanVideo,
    "WanVideoToVideoPipeline": WanVideo,
    "WanImageToVideoPipeline": WanImageVideo,
    "WanVACEPipeline": WanVaceVideo,
    "LTXPipeline": LTXVideo,
    "CogVideoXPipeline": CogVideoXVideo,
    "CogVideoXVideoToVideoPipeline": CogVideoXVideo,
    "HunyuanVideoPipeline": HunyuanVideo,
    "HunyuanVideo15Pipeline": Hunyuan15Video,
    "MochiPipeline": MochiVideo,
}


def from_pipeline(pipe: Any, **options: Any) -> PipelineVideo:
    """Make a diffusers pipeline a model for `edit_video` and `KVLock`: a denoiser with its VAE, prompts and schedule.

    Args:
        pipe: A loaded pipeline of a known family: Wan, LTX, CogVideoX, HunyuanVideo or Mochi.
        options: Of `PipelineVideo`, and of one family: `image` (Wan image to video), `reactive`, `conditioning_scale`
            (VACE), `frame_rate`, `decode_timestep`, `decode_noise_scale` (LTX), `embedded_guidance` (HunyuanVideo).

    Raises:
        PipelineError: The class or an option is unknown, or the scheduler does not fit the family.
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]  # A user's subclass is of the family, too.
    family = family_of(next((name for name in names if name in FAMILIES), names[0]))
    # Keyword-only arguments of the class and of the classes that it passes the rest to.
    makers = (inspect.signature(vars(kind)["__init__"]) for kind in family.__mro__ if "__init__" in vars(kind))
    known = {name for maker in makers for name, p in maker.parameters.items() if p.kind is p.KEYWORD_ONLY}
    if wrong := sorted(options.keys() - known):
        raise PipelineError(f"{wrong[0]!r} is no option for {type(pipe).__name__}; {nearest(wrong[0], sorted(known))}.")
    return family(pipe, **options)


def family_of(name: str) -> type[PipelineVideo]:
    """Return the class for pipelines of this class name. Raises PipelineError for an unknown one."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, [known for known in FAMILIES if known[:3] == name[:3]], n=1, cutoff=0)
        same = f"\n  If it has the parts of {near[0]}: {near[0]}.from_pipe(pipe)." if near else ""
        raise PipelineError(
            f"{name} is of no known family; there are {', '.join(FAMILIES)}.{same}\n"
            "  Other models: kv.KVLock(kv.FlowDenoiser(transformer, time_scale=1000, call=...), ...)."
        )
    return FAMILIES[name]


def load_pipeline(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    offload: Offload = "none",
    tile_vae: bool = False,
    **options: Any,
) -> PipelineVideo:
    """Load a pipeline from a folder and make it a model for `edit_video` and `KVLock`.

    Args:
        folder: What `pipe.save_pretrained(folder)` or a download wrote; it holds model_index.json.
        dtype: Of the weights, e.g. "bfloat16"; default: bfloat16 on an accelerator, float32 on a CPU. The VAE is in
            float32, because its round trip is the ceiling of every edit.
        device: Where to compute; default: the accelerator, or the CPU.
        offload: "none"; "model": one network on the device at a time; "group": one layer at a time, the slowest.
        tile_vae: Encode and decode in overlapping tiles: less memory for large clips, faint seams.
        options: As in `from_pipeline`.

    Raises:
        PipelineError: The folder does not exist, is of an unknown family, or is incomplete; an option is unknown.
        KVLockError: diffusers or transformers is not installed.
    """
    folder = Path(os.path.expanduser(folder))
    kind = _class_name(folder)
    family_of(kind)
    if offload not in get_args(Offload):
        raise PipelineError(f"offload={offload!r}; expected one of {', '.join(get_args(Offload))}.")
    default = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        place = torch.zeros((), device=default if device is None else device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # of an unknown device, or one without its driver
        raise PipelineError(f"device={device!r}; expected e.g. 'cuda', 'cuda:1' or 'cpu': {error}") from None
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise PipelineError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}.")
    usual = torch.float32 if place.type == "cpu" else torch.bfloat16
    weights = usual if dtype is None else DTYPES[dtype] if isinstance(dtype, str) else dtype
    with warnings.catch_warnings():
        # Newer versions say dtype=; this name works in all accepted versions.
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        diffusers, _ = require("diffusers", "diffusers"), require("transformers", "diffusers")
        try:
            pipe = getattr(diffusers, kind).from_pretrained(
                folder, local_files_only=True, torch_dtype={"default": weights, "vae": torch.float32}
            )
        except Exception as error:  # A damaged folder makes diffusers and safetensors raise almost anything.
            raise PipelineError(
                f"{folder} could not be loaded as {kind}; is the download complete? {str(error).strip()[:500]}\n"
                "  hf download NAME --local-dir FOLDER; for packages: pip install 'kvlock-sampling[diffusers]'\n"
                f'  Files of a variant: kv.from_pipeline({kind}.from_pretrained(folder, variant="fp16"))'
            ) from error
    pipe.set_progress_bar_config(disable=True)
    if tile_vae:
        pipe.vae.enable_tiling()
    warn_if_too_large(pipe, place, offload)
    place_pipeline(pipe, place, offload)
    return from_pipeline(pipe, **options)


def place_pipeline(pipe: Any, device: torch.device | str, offload: Offload = "none") -> None:
    """Put a loaded pipeline on a device, whole or part by part; see `load_pipeline`."""
    device = torch.device(device)
    if device.type == "cpu":
        # CPU kernels round by where a tensor begins, so results would depend on how a model was loaded.
        for tensor in (t for module in _modules(pipe) for t in (*module.parameters(), *module.buffers())):
            if tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")


def warn_if_too_large(pipe: Any, device: torch.device, offload: Offload) -> None:
    """Warn if the weights alone exceed the device's free memory. Only CUDA says how much is free."""
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in _modules(pipe)]
    if device.type != "cuda" or offload == "group" or not sizes:
        return
    needed, free = sum(sizes) if offload == "none" else max(sizes), torch.cuda.mem_get_info(device)[0]
    if needed > free:
        warn(
            f"{type(pipe).__name__} puts {needed / 1e9:.3g} GB of weights on {device}, which has {free / 1e9:.3g} GB "
            'free. Pass dtype="bfloat16", offload="model" or offload="group" (--dtype, --offload).',
        )


def _modules(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _class_name(folder: Path) -> str:
    if not (index := folder / INDEX).is_file():
        state = "does not exist" if not folder.exists() else f"holds no {INDEX}"
        raise PipelineError(
            f"{folder} {state}; expected a folder that pipe.save_pretrained(folder) wrote, or a download:\n"
            "  hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir wan"
        )
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{index} names no pipeline class ({error!r}); is the download complete?") from error
