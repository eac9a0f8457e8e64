"""What a locked edit costs, as ratios within one run:  python benchmarks/speed.py

Per evaluation of the sampler: plain guidance without any lock, and with one more row, which does nothing; the published
procedure written plainly (a full pass of the source, K/V of all layers kept, then both branches); the source in
lockstep; only the foreground, alone and with a KV cache that is refreshed every third evaluation, or was filled by an
earlier edit. At Wan-1.3B's geometry with random weights, few layers and few thousand tokens; and on the embedded model.

What a network does outside its layers weighs more in two layers than in thirty. So two depths are measured in turn,
and what the full depth takes is read off the line through them. Writes benchmarks/results/speed.json
and, of several shares, docs/images/speed.png. On a GPU: --device cuda --dtype bfloat16 --layers 30 --latents 21 60 104
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from measuring import keep_freed_memory, peak_bytes, seconds
from torch import Tensor, nn

import kvlock_sampling as kv
from kvlock_sampling import tiny
from kvlock_sampling.batching import join_calls
from kvlock_sampling.utils.extras import hide_broken_torchvision
from kvlock_sampling.utils.files import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.05, 0.25, 0.5, 0.75)
FULL = kv.Constant(lock=1.0)


class Subject(NamedTuple):
    """A denoiser with what one evaluation of it needs. layers: where only some of a deeper network's are built."""

    name: str
    layers: int | None
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
        hide_broken_torchvision()
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
    name = f"Wan-1.3B geometry, {tokens} tokens"
    return Subject(
        name, layers, model, source.to(device), (source + sigmas[0] * noise).to(device), cfg, sigmas, (1, 2, 2)
    )


def embedded(evaluations: int) -> Subject:
    video = tiny.load()
    before, after = tiny.sample_edit(3, "reshape")
    source = video.encode(tiny.render([before]))
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    sigmas = [float(s) for s in video.sigmas(evaluations)[:-1]]
    cfg = {"cond": video.prompt([after.prompt]), "uncond": video.prompt([""]), "cond_scale": 3.0}
    return Subject("embedded model", None, video.denoiser, source, source + sigmas[0] * noise, cfg, sigmas, video.patch)


@contextmanager
def evaluations(denoiser: Any, subject: Subject) -> Iterator[Callable[[Sequence[float]], None]]:
    """One run of a denoiser: a function that evaluates at noise levels."""

    def evaluate(sigmas: Sequence[float]) -> None:
        with torch.inference_mode():
            for sigma in sigmas:
                denoiser(subject.x, torch.tensor([sigma], device=subject.x.device), **subject.cfg)

    with denoiser if isinstance(denoiser, kv.KVLock) else nullcontext():
        yield evaluate


class OneMoreRow:
    """Guidance on [uncond, cond, cond], whose last row is unused: the least cost of a row for the source."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Any, uncond: Any, cond_scale: float) -> Tensor:
        rows = join_calls([{"cond": uncond}, {"cond": cond}, {"cond": cond}], len(x))
        empty, full, _ = self.model(torch.cat([x] * 3), torch.cat([sigma] * 3), **rows).chunk(3)
        return empty + cond_scale * (full - empty)


def ways(subject: Subject, share: float | None) -> dict[str, Callable[[], Any]]:
    """How to make the denoiser of each way to edit, anew for each run. Without a share: those it does not matter to."""

    def lock(**options: Any) -> kv.KVLock:
        mask = subject.mask(0.25 if share is None else share)
        return kv.KVLock(subject.model, source=subject.source, mask=mask, policy=FULL, noise="fixed", **options)

    if share is None:
        return {
            "plain": lambda: kv.CFGDenoiser(subject.model),
            "one more row": lambda: OneMoreRow(subject.model),
            "procedure": lambda: lock(batched=False, foreground=False),
            "lockstep": lambda: lock(foreground=False),
        }
    filled = kv.KVCache(budget=None, format=None, every=3, ratio=None)
    return {
        "foreground": lambda: lock(foreground=True),
        "foreground, KV cache every 3": lambda: lock(
            foreground=True, kv_cache=kv.KVCache(budget=None, every=3, ratio=None)
        ),
        "foreground, filled KV cache": lambda: lock(foreground=True, kv_cache=filled),
    }


Row = dict[str, Any]
Key = tuple[int, float | None, str]


Maker = tuple[int, float | None, str, Callable[[], Any]]


def one_round(subjects: list[Subject], makers: list[Maker], say: Callable[[str], None]) -> list[float]:
    """Seconds of one run of each way.

    On a CPU they take turns at every evaluation, so that a machine that slows down slows all of them. On a GPU whole
    runs do, because the copies of a KV cache go on beside the next evaluation and end with the run's block.
    """
    device, spent = subjects[0].x.device, [0.0] * len(makers)
    if device.type == "cuda":

        def run(index: int, make: Callable[[], Any]) -> None:
            with evaluations(make(), subjects[index]) as evaluate:
                evaluate(subjects[index].sigmas)

        return [seconds(partial(run, index, make), device) for index, _, _, make in makers]
    with ExitStack() as stack:
        runs = [stack.enter_context(evaluations(make(), subjects[index])) for index, _, _, make in makers]
        for i, sigma in enumerate(subjects[0].sigmas):
            for part, (index, share, way, _) in enumerate(makers):
                took = seconds(partial(runs[part], [sigma]), device)
                spent[part] += took
                say(f"evaluation {i}, {subjects[index].layers} layers, {way} {share or ''}: {took:.3f} s")
    return spent


def measure(
    subjects: list[Subject],
    depth: int | None,
    rounds: int,
    say: Callable[[str], None],
    shares: Sequence[float] = SHARES,
    only: Sequence[str] = (),
) -> list[Row]:
    """Rows of every subject, and with two of them those of a network of `depth` layers.

    only: the ways to measure beside plain guidance. Empty: all.
    """
    device = subjects[0].x.device
    makers: list[Maker] = [
        (index, share, way, make)
        for index, subject in enumerate(subjects)
        for share in (None, *shares)
        for way, make in ways(subject, share).items()
        if not only or way in ("plain", *only)
    ]
    times: dict[Key, list[float]] = {(index, share, way): [] for index, share, way, _ in makers}
    peaks: dict[Key, float] = {}
    for index, share, way, make in makers:  # warm up, fill the KV caches, and measure memory
        subject = subjects[index]
        some = subject.sigmas if "cache" in way else subject.sigmas[:1]  # without a cache the first needs the most
        with evaluations(make(), subject) as run:
            held = (*subject.model.parameters(), *subject.model.buffers(), subject.x, subject.source, subject.cfg)
            peaks[index, share, way] = peak_bytes(partial(run, some), device, held)
        say(f"{subject.name}, {subject.layers} layers: warm, {way} {'' if share is None else share}")
    for turn in range(rounds):
        say(f"round {turn}")
        for (index, share, way, _), spent in zip(makers, one_round(subjects, makers, say), strict=True):
            times[index, share, way].append(spent / len(subjects[index].sigmas))
    labels = [(subject.layers, False) for subject in subjects]
    if depth is not None and len(subjects) == 2:
        labels.append((depth, True))
        few, more = (subject.layers or 0 for subject in subjects)
        beyond = (depth - few) / (more - few)
        for _, share, way, _ in makers[: len(makers) // 2]:
            pairs = zip(times[0, share, way], times[1, share, way], strict=True)
            times[2, share, way] = [a + beyond * (b - a) for a, b in pairs]
            peaks[2, share, way] = peaks[0, share, way] * (1 - beyond) + peaks[1, share, way] * beyond
    rows = []
    for (index, share, way), mine in times.items():
        plain = (index, None, "plain")
        ratios = [own / base for own, base in zip(mine, times[plain], strict=True)]
        layers, computed = labels[index]
        rows.append(
            {
                "model": subjects[0].name,
                "layers": layers,
                "computed": computed,
                "share": share,
                "way": way,
                "seconds": statistics.median(mine),
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "peak_bytes": round(peaks[index, share, way]),
                "memory_ratio": peaks[index, share, way] / peaks[plain],
            }
        )
    return rows


def title(row: Row) -> str:
    """Of the model that a row is about."""
    if row["layers"] is None:
        return str(row["model"])
    return f"{row['model']}, {row['layers']} layers{' (from the two)' if row['computed'] else ''}"


def figure(tables: list[list[Row]], path: Path) -> None:
    fig, axes = plt.subplots(1, len(tables), figsize=(6 * len(tables), 4), squeeze=False)
    colours = {"procedure": "tab:red", "lockstep": "tab:orange", "plain": "0.4"}
    for axis, rows in zip(axes[0], tables, strict=True):
        for row in rows:
            if row["way"] in colours:
                axis.axhline(row["ratio"], color=colours[row["way"]], ls="--", lw=1.2, label=row["way"])
        for way in ("foreground", "foreground, KV cache every 3", "foreground, filled KV cache"):
            curve = [r for r in rows if r["way"] == way]
            axis.plot([r["share"] for r in curve], [r["ratio"] for r in curve], "o-", label=way)
        axis.set(title=title(rows[0]), xlabel="share of the tokens that is edited", ylabel="time / plain guidance")
        axis.set(ylim=(0, None), xlim=(0, 0.8))
        axis.legend(fontsize=8)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path.with_suffix(".tmp.png"), dpi=110)
    os.replace(path.with_suffix(".tmp.png"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=(2, 4), help="one depth, or two to read a third off")
    parser.add_argument("--depth", type=int, default=30, help="of the whole network, where two depths are measured")
    parser.add_argument("--latents", type=int, nargs=3, default=(5, 32, 48), metavar=("TIME", "HEIGHT", "WIDTH"))
    parser.add_argument("--evaluations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the tokens that are edited")
    parser.add_argument("--ways", nargs="+", default=(), help="to measure beside plain guidance; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="speed", help="of the results' files")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    dtype = getattr(torch, given.dtype)
    large = [wan(n, tuple(given.latents), given.evaluations, given.device, dtype) for n in given.layers[:2]]
    rows = measure(large, given.depth, given.rounds, say, given.shares, given.ways)
    deepest = rows[-1]["layers"]
    tables = [[row for row in rows if row["layers"] == deepest]]
    if given.device == "cpu" and not given.ways:
        tables.append(measure([embedded(6)], None, 3 * given.rounds, say))
        rows += tables[-1]
    about = {"device": given.device, "dtype": given.dtype, "threads": given.threads, "torch": torch.__version__}
    about["machine"] = platform.machine() if given.device == "cpu" else torch.cuda.get_device_name()
    results = {"about": about, "rows": rows}
    write_atomically(ROOT / f"benchmarks/results/{given.name}.json", json.dumps(results, indent=1) + "\n")
    if len(given.shares) > 1:
        figure(tables, ROOT / f"docs/images/{given.name}.png")
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        print(
            f"{title(row):58} {share:>4} {row['way']:26} {row['seconds']:8.3f} s  x{row['ratio']:.2f} "
            f"({row['low']:.2f} to {row['high']:.2f})  memory x{row['memory_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
