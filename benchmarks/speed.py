"""What a locked edit costs, as ratios within one run:  python benchmarks/speed.py

Per evaluation of the sampler: plain guidance without any lock; the published procedure written plainly (a full pass of
the source, K/V of all layers kept, then both branches); the source in lockstep; only the foreground, alone and with a
bank that is refreshed every third evaluation, or was filled by an earlier edit. At Wan-1.3B's geometry with random
weights, few layers and few thousand tokens; and on the embedded model. Writes benchmarks/results/speed.json and
docs/images/speed.png. On a GPU: --device cuda --dtype bfloat16 --layers 30 --latents 21 60 104
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvlock_sampling as kv
from kvlock_sampling import tiny
from kvlock_sampling.compat import broken_torchvision_hidden
from kvlock_sampling.files import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.05, 0.25, 0.5, 0.75)
FULL = kv.Constant(lock=1.0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive: those made inside, until their storage is freed. Keeps the peak."""

    def __init__(self, there_before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in there_before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known and size:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Subject(NamedTuple):
    """A denoiser with what one evaluation of it needs."""

    name: str
    model: nn.Module
    source: Tensor
    x: Tensor
    cfg: dict[str, Any]
    sigmas: list[float]
    patch: tuple[int, int, int]

    def mask(self, share: float) -> Tensor:
        """A box of whole tokens over this share of every frame, from the left."""
        mask = torch.zeros(1, 1, *self.source.shape[2:])
        columns = self.source.shape[-1] // self.patch[2]
        rows = self.source.shape[-2] // self.patch[1]
        count = max(1, round(share * rows * columns))
        cells = torch.zeros(rows * columns)
        cells[torch.arange(rows * columns).view(rows, columns).t().flatten()[:count]] = 1
        grown = cells.view(rows, columns).repeat_interleave(self.patch[1], 0).repeat_interleave(self.patch[2], 1)
        mask[:] = grown
        return mask


class Wan(nn.Module):
    """Wan-1.3B's geometry behind the call of a flow model, random weights."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        with broken_torchvision_hidden():
            from diffusers import WanTransformer3DModel
        self.transformer = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=layers, text_dim=4096
        )

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        dtype = self.transformer.dtype
        text = cond.to(dtype).expand(len(z), -1, -1)
        return self.transformer(z.to(dtype), t * 1000, text, return_dict=False)[0]


def wan(layers: int, latents: tuple[int, int, int], evaluations: int, device: str, dtype: torch.dtype) -> Subject:
    torch.manual_seed(0)
    with torch.device(device):
        model = kv.FlowDenoiser(Wan(layers).to(dtype)).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    source = torch.randn(1, 16, *latents, generator=draw)
    noise = torch.randn(source.shape, generator=draw)
    texts = torch.randn(2, 1, 512, 4096, generator=draw)
    sigmas = torch.logspace(1, -0.5, evaluations).tolist()
    cfg = {"cond": texts[0].to(device), "uncond": texts[1].to(device), "cond_scale": 5.0}
    tokens = latents[0] * latents[1] * latents[2] // 4
    name = f"Wan-1.3B geometry, {layers} layers, {tokens} tokens"
    return Subject(name, model, source.to(device), (source + sigmas[0] * noise).to(device), cfg, sigmas, (1, 2, 2))


def embedded(evaluations: int) -> Subject:
    video = tiny.load()
    before, after = tiny.world.sample_edit(3, "replace")
    source = video.encode(tiny.world.render([before]))
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    sigmas = [float(s) for s in video.sigmas(evaluations)[:-1]]
    cfg = {"cond": video.prompt([after.prompt]), "uncond": video.prompt([""]), "cond_scale": 3.0}
    return Subject("embedded model", video.denoiser, source, source + sigmas[0] * noise, cfg, sigmas, (2, 4, 4))


@contextmanager
def evaluations(denoiser: Any, subject: Subject) -> Iterator[Callable[[], None]]:
    """One run of a denoiser over the subject's noise levels."""

    def run() -> None:
        with torch.inference_mode(), denoiser if isinstance(denoiser, kv.KVLock) else torch.inference_mode():
            for sigma in subject.sigmas:
                denoiser(subject.x, torch.tensor([sigma], device=subject.x.device), **subject.cfg)

    yield run


def ways(subject: Subject, share: float | None) -> dict[str, Callable[[], Any]]:
    """How to make the denoiser of each way to edit, anew for each run. Without a share: those it does not matter to."""

    def lock(**options: Any) -> kv.KVLock:
        mask = subject.mask(0.25 if share is None else share)
        return kv.KVLock(subject.model, source=subject.source, mask=mask, policy=FULL, noise="fixed", **options)

    if share is None:
        return {
            "plain": lambda: kv.CFGDenoiser(subject.model),
            "procedure": lambda: lock(batched=False, foreground=False),
            "lockstep": lambda: lock(foreground=False),
        }
    filled = kv.Bank(budget=None, format=None, every=3, ratio=None)
    return {
        "foreground": lambda: lock(foreground=True),
        "foreground, bank every 3": lambda: lock(foreground=True, bank=kv.Bank(budget=None, every=3, ratio=None)),
        "foreground, filled bank": lambda: lock(foreground=True, bank=filled),
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def peak(run: Callable[[], None], subject: Subject) -> int:
    """Most bytes alive at once beyond what was there before."""
    gc.collect()
    device = subject.x.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    held = [*subject.model.parameters(), *subject.model.buffers(), subject.x, subject.source]
    held += [leaf for leaf in tree_leaves(subject.cfg) if isinstance(leaf, Tensor)]
    with LiveBytes(held) as live:
        run()
    return live.peak


def measure(subject: Subject, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    device = subject.x.device
    rows: list[dict[str, Any]] = []
    makers = [(None, way, make) for way, make in ways(subject, None).items()]
    makers += [(share, way, make) for share in SHARES for way, make in ways(subject, share).items()]
    times: dict[tuple[float | None, str], list[float]] = {}
    for turn in range(rounds + 1):  # the first turn warms up, fills the banks, and measures memory
        for share, way, make in makers:
            with evaluations(make(), subject) as run:
                if turn == 0:
                    rows.append({"model": subject.name, "share": share, "way": way, "peak_bytes": peak(run, subject)})
                else:
                    times.setdefault((share, way), []).append(seconds(run, device) / len(subject.sigmas))
            say(f"{subject.name}: turn {turn}, {way} {'' if share is None else share}")
    base = statistics.median(times[None, "plain"])
    base_bytes = rows[0]["peak_bytes"]
    for row in rows:
        mine = times[row["share"], row["way"]]
        row |= {
            "seconds": statistics.median(mine),
            "ratio": statistics.median(mine) / base,
            "low": min(mine) / base,
            "high": max(mine) / base,
            "memory_ratio": row["peak_bytes"] / base_bytes,
        }
    return rows


def figure(tables: list[list[dict[str, Any]]], path: Path) -> None:
    fig, axes = plt.subplots(1, len(tables), figsize=(6 * len(tables), 4), squeeze=False)
    colours = {"procedure": "tab:red", "lockstep": "tab:orange", "plain": "0.4"}
    for axis, rows in zip(axes[0], tables, strict=True):
        for way, colour in colours.items():
            level = next(r["ratio"] for r in rows if r["way"] == way)
            axis.axhline(level, color=colour, ls="--", lw=1.2, label=way)
        for way in ("foreground", "foreground, bank every 3", "foreground, filled bank"):
            curve = [r for r in rows if r["way"] == way]
            axis.plot([r["share"] for r in curve], [r["ratio"] for r in curve], "o-", label=way)
        axis.set(title=rows[0]["model"], xlabel="share of the tokens that is edited", ylabel="time / plain guidance")
        axis.set(ylim=(0, None), xlim=(0, 0.8))
        axis.legend(fontsize=8)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path.with_suffix(".tmp.png"), dpi=110)
    os.replace(path.with_suffix(".tmp.png"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--latents", type=int, nargs=3, default=(5, 32, 48), metavar=("TIME", "HEIGHT", "WIDTH"))
    parser.add_argument("--evaluations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="speed", help="of the results' files")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    dtype = getattr(torch, given.dtype)
    large = wan(given.layers, tuple(given.latents), given.evaluations, given.device, dtype)
    tables = [measure(large, given.rounds, say)]
    if given.device == "cpu":
        tables.append(measure(embedded(6), 3 * given.rounds, say))
    about = {"device": given.device, "dtype": given.dtype, "threads": given.threads, "torch": torch.__version__}
    about["machine"] = platform.machine() if given.device == "cpu" else torch.cuda.get_device_name()
    results = {"about": about, "rows": [row for rows in tables for row in rows]}
    write_atomically(ROOT / f"benchmarks/results/{given.name}.json", json.dumps(results, indent=1) + "\n")
    figure(tables, ROOT / f"docs/images/{given.name}.png")
    for row in results["rows"]:
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        print(
            f"{row['model']:46} {share:>4} {row['way']:26} {row['seconds']:8.3f} s  x{row['ratio']:.2f} "
            f"({row['low']:.2f} to {row['high']:.2f})  memory x{row['memory_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
