"""A folder of diffusers (`save_pretrained`) as a model to edit with: checked before anything is read, then placed.

What a folder holds is known from its small files, so a pipeline of an unknown family, or weights that cannot fit, are
refused within a second and not after minutes of loading. Nothing is ever downloaded.
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from ....utils.torchvision import broken_torchvision_hidden
from ..errors import PipelineError
from .base import PipelineVideo
from .families import family_of, from_pipeline

Offload = Literal["none", "model", "group"]
OFFLOADS: tuple[Offload, ...] = ("none", "model", "group")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model_index.json"
GB = 1e9
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def load_pipeline(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    offload: Offload = "none",
    vae_dtype: torch.dtype = torch.float32,
    tile_vae: bool = False,
    **options: Any,
) -> PipelineVideo:
    """Load a pipeline from a folder and make it a model to edit with.

    Args:
        folder: what `pipe.save_pretrained(folder)` or a download wrote; it holds model_index.json.
        dtype: of the weights, e.g. "bfloat16"; default: bfloat16 on an accelerator, float32 on a CPU. The sampling
            state is float32 whatever the weights are.
        device: where to compute; default: the accelerator, or the CPU.
        offload: "none": everything on the device. "model": one network at a time, the others in host memory.
            "group": one layer at a time, the least device memory and the slowest. Results are the same.
        vae_dtype: of the VAE; float32, since its round trip is the ceiling of every edit.
        tile_vae: encode and decode in overlapping tiles: less memory for large clips, faint seams.
        options: as `from_pipeline` takes.

    Raises:
        PipelineError: no such folder, an unknown family, weights that do not fit, packages that are missing.
    """
    folder = Path(folder)
    kind = _class_name(folder)
    family_of(kind)
    if offload not in OFFLOADS:
        raise PipelineError(f"offload={offload!r}; expected one of {', '.join(OFFLOADS)}.")
    place = default_device() if device is None else torch.device(device)
    weights = _dtype(dtype, place)
    check_memory(folder, weights, vae_dtype, place, offload)
    try:
        with broken_torchvision_hidden(), warnings.catch_warnings():
            # Newer versions say dtype=; this name works in all that we accept.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            import diffusers
            import transformers  # noqa: F401 - text encoders; diffusers' own message about it names no command

            pipe = getattr(diffusers, kind).from_pretrained(
                folder, local_files_only=True, torch_dtype={"default": weights, "vae": vae_dtype}
            )
    except ImportError as error:
        raise PipelineError(
            f"loading {folder} needs {error.name or 'a package that is not installed'} ({error}).\n"
            "  pip install 'kvlock-sampling[pipelines]'"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:  # whatever a damaged folder makes diffusers raise
        raise PipelineError(f"{folder} could not be loaded as {kind}: {str(error).strip()[:500]}") from error
    pipe.set_progress_bar_config(disable=True)
    if tile_vae:
        pipe.vae.enable_tiling()
    place_pipeline(pipe, place, offload)
    return from_pipeline(pipe, **options)


def is_pipeline_folder(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder of diffusers, as against weights of the embedded model."""
    return (Path(path) / INDEX).is_file()


def place_pipeline(pipe: Any, device: torch.device | str, offload: Offload = "none") -> None:
    """Put a loaded pipeline on a device, wholly or by turns; see `load_pipeline`. On a CPU offloading saves nothing,
    but runs the same hooks."""
    device = torch.device(device)
    if device.type == "cpu":
        _align(pipe)
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        # Streams overlap copying with computing, where there are any.
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")


def _align(pipe: Any) -> None:
    """Weights mapped from files begin anywhere; CPU kernels round by where a tensor begins, and offloading copies some
    of them. Copies begin at multiples of 64 bytes, so results do not depend on the way a model was loaded."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for tensor in (t for part in parts for t in (*part.parameters(), *part.buffers())):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def default_device() -> torch.device:
    """The accelerator, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def check_memory(
    folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device, offload: Offload
) -> None:
    """Raises PipelineError if the weights alone are larger than the memory they must be in. Only files' headers are
    read; what the run itself needs comes on top, and is not known before."""
    parts = weight_bytes(folder, dtype, vae_dtype)
    if not parts:
        return
    total, (largest, most) = sum(parts.values()), max(parts.items(), key=lambda item: item[1])
    on_device = {"none": total, "model": most, "group": 0}[offload]
    free = memory_of(device)
    listed = ", ".join(f"{name} {size / GB:.3g}" for name, size in sorted(parts.items(), key=lambda i: -i[1]))
    name = str(dtype).removeprefix("torch.")
    if free is not None and on_device > free:
        ways = []
        if offload == "none" and device.type != "cpu" and most < free:
            ways.append(f'offload="model" (--offload model): {largest} alone, {most / GB:.3g} GB')
        if offload != "group" and device.type != "cpu":
            ways.append('offload="group" (--offload group): one layer at a time')
        if dtype.itemsize > 2:
            ways.append('dtype="bfloat16" (--dtype bfloat16): half of it')
        ways.append("a smaller checkpoint of the same family")
        raise PipelineError(
            f"{folder} does not fit: {on_device / GB:.3g} GB of weights in {name} ({listed}), and {device} has "
            f"{free / GB:.3g} GB.\n  Pass " + ", or\n  ".join(ways) + "."
        )
    host = memory_of(torch.device("cpu"))
    if offload != "none" and device.type != "cpu" and host is not None and total > host:
        raise PipelineError(
            f"{folder} does not fit: offloading keeps {total / GB:.3g} GB of weights in {name} ({listed}) in host "
            f"memory, which has {host / GB:.3g} GB.\n  Pass a smaller dtype, or a smaller checkpoint."
        )


def weight_bytes(folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every component once loaded, from the headers of its safetensors files; empty where there are none."""
    found = {}
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(part.glob("*.safetensors"))
        if index := sorted(part.glob("*.safetensors.index.json")):
            files = sorted(part / name for name in _shards(index[0]))
        else:
            files = [file for file in files if file.stem.count(".") == 0] or files[:1]  # not its variants as well
        if numbers := sum(_numbers(file) for file in files if file.is_file()):
            found[part.name] = numbers * (vae_dtype if part.name == "vae" else dtype).itemsize
    return found


def memory_of(device: torch.device) -> int | None:
    """Bytes that may be used: free ones of an accelerator, all of a host; None where that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        try:
            return min(whole, int(CONTAINER_LIMIT.read_text()))
        except (OSError, ValueError):  # no container, or one without a limit: "max"
            return whole
    return None


def _numbers(file: Path) -> int:
    """How many numbers a safetensors file holds. Its header: 8 bytes of length, then JSON."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:  # else the text of a git-lfs pointer asks for exabytes
                raise ValueError(f"its header is said to be of {length} bytes")
            header = json.loads(stream.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
        if size < end:
            raise ValueError(f"its header tells of {end} bytes")
        return sum(math.prod(entry["shape"]) for entry in entries)
    except (ValueError, struct.error, AttributeError, KeyError, IndexError, TypeError) as error:
        raise PipelineError(
            f"{file}, {size} bytes, is no safetensors file ({error}); is the download complete? Files of a few hundred "
            "bytes of text are git-lfs pointers: git lfs pull, or\n  hf download NAME --local-dir FOLDER"
        ) from error


def _shards(index: Path) -> set[str]:
    """The names of the files that hold a component's weights together."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{index} names no files ({error!r}); is the download complete?") from error


def _class_name(folder: Path) -> str:
    index = folder / INDEX
    if not index.is_file():
        state = "is not there" if not folder.exists() else f"holds no {INDEX}"
        raise PipelineError(
            f"{folder} {state}; expected a folder of diffusers, as pipe.save_pretrained(folder) writes it, or a "
            "download:\n  hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir wan"
        )
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{index} names no pipeline class ({error!r}); is the download complete?") from error
    return str(name)


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise PipelineError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
