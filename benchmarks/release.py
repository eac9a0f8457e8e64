"""Who may touch the background, and when?  python benchmarks/release.py [--edits 300]

Held-out edits of five kinds on the stage, whose true results are known, and every way of compositing, locking and
releasing from the same scenes and noise: constants, static schedules with and without the lock, `Release` by the
divergence, and controls: a random gate that releases as much, more steps, a larger mask, the same release where the
effects truly are.
Whole frames are scored against the true render, and mask, effect region and rest apart.

Each row is written to benchmarks/results/release.json when it is done, and is not measured again. The table is
benchmarks/results/release.md. `--search` measures static schedules on other scenes, of which the best is "static".
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import max_pool3d
from world.judge import judge_edits

import kvlock_sampling as kv
from kvlock_sampling import samplers
from kvlock_sampling.denoisers import FlowDenoiser
from kvlock_sampling.policy import Constant, Policy, PolicyWrapper, Release, ReleaseBelow
from kvlock_sampling.tiny import Scene, load, render, sample_edit, tokenize
from kvlock_sampling.tiny.model import PATCH
from kvlock_sampling.tiny.world import EDITS, regions
from kvlock_sampling.types import Control, Observation
from kvlock_sampling.utils.files import write_atomically
from kvlock_sampling.variance import Divergence

RESULTS = Path(__file__).resolve().parent / "results"
FIRST_SCENE, SEARCHED_SCENE = 800_000, 900_000
STEPS, CFG_SCALE, BATCH = 16, 3.0, 50
SCORES = ("all", "mask", "effect", "rest", "leftover", "right", "intruder")
Options = dict[str, Any]


class Batch(NamedTuple):
    """Edits with their true results. Regions are (batch, 1, 8, 64, 64), 0 or 1."""

    kinds: list[str]
    sources: list[Scene]
    targets: list[Scene]
    source: Tensor
    target: Tensor
    mask: Tensor
    effect: Tensor
    rest: Tensor
    noise: Tensor


def batches(first: int, count: int) -> Iterator[Batch]:
    """Edits of the five kinds in turn, one for each scene."""
    for start in range(first, first + count, BATCH):
        seeds = range(start, min(start + BATCH, first + count))
        kinds = [EDITS[seed % len(EDITS)] for seed in seeds]
        sources, targets = map(list, zip(*map(sample_edit, seeds, kinds), strict=True))
        clips = render(sources), render(targets)
        noise = [torch.randn(clips[0].shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        yield Batch(kinds, sources, targets, *clips, *regions(sources, targets), torch.stack(noise))


class Bfloat16(nn.Module):
    """A network with its matrix products in bfloat16."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, t: Tensor, **given: Tensor) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16):
            return self.network(z, t, **given).float()


class Unseen(nn.Module):
    """A network with tokens that its self-attention does not read where a call names them: unseen, (batch, tokens)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, t: Tensor, cond: Tensor, unseen: Tensor | None = None) -> Tensor:
        if unseen is None:
            return self.network(z, t, cond=cond)
        attend, seen = F.scaled_dot_product_attention, (unseen == 0)[:, None, None, :].to(z.device)

        def masked(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
            if query.shape[-2] == key.shape[-2] == seen.shape[-1]:
                options["attn_mask"] = seen.expand(len(query), 1, 1, -1)
            return attend(query, key, value, *args, **options)

        with mock.patch.object(F, "scaled_dot_product_attention", masked):
            return self.network(z, t, cond=cond)


@dataclass(frozen=True, eq=False)
class Where(Policy):
    """A released map that is known beforehand, (batch, tokens): composite 1 - released, lock 0 there."""

    released: Tensor
    below: float = 3.0
    lock: float = 0.75

    uses_risk = False
    may_lock = True

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        if obs.sigma > self.below:
            return state, Control(self.lock, composite=1.0)
        return state, Control(self.lock * (1 - self.released), composite=1 - self.released)


@dataclass(frozen=True, eq=False)
class Shuffled(PolicyWrapper):
    """A policy whose decisions are dealt to other background tokens of the same clip, at random but once for all."""

    background: Tensor

    def _adjust(self, control: Control, obs: Observation) -> Control:
        if not isinstance(control.composite, Tensor):
            return control
        lock, composite = torch.as_tensor(control.lock).expand_as(control.composite).clone(), control.composite.clone()
        for clip, tokens in enumerate(self.background):
            places = tokens.nonzero().flatten()
            dealt = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(clip))]
            lock[clip, places], composite[clip, places] = lock[clip, dealt], composite[clip, dealt]
        return control._replace(lock=lock, composite=composite)


def tokens(region: Tensor) -> Tensor:
    """Which tokens a region reaches into, (batch, tokens)."""
    return max_pool3d(region, PATCH).flatten(1)


ADAPTIVE: Options = {"policy": "release", "erase": True}
STATIC: Options = {"policy": ReleaseBelow(below=2.0, lock=0.25), "erase": True, "reach": 0.5}
ANYWHERE: Options = {"policy": ReleaseBelow(below=3.0, lock=0.5), "erase": True}


def shuffled(batch: Batch) -> Options:
    preset = kv.presets.load_preset("release")
    policy = Shuffled(preset.policy, background=tokens(batch.mask) == 0)
    return {"policy": policy, "estimator": preset.estimator, "erase": True}


def unseen(**options: Any) -> Callable[[Batch], Options]:
    """The same with keys and values from a source that does not read its masked tokens."""

    def row(batch: Batch) -> Options:
        words = tokenize([scene.prompt for scene in batch.sources])
        return {"erase": False, "source_args": {"cond": words, "unseen": tokens(batch.mask)}, **options}

    return row


def larger_mask(**options: Any) -> Callable[[Batch], Options]:
    """The same with a mask that is a token larger on every side, as one may draw it to cover shadow and light."""
    wider = PATCH[1]
    return lambda batch: {
        "mask": max_pool3d(batch.mask, (1, 2 * wider + 1, 2 * wider + 1), 1, (0, wider, wider)),
        **options,
    }


ROWS: dict[str, Options | Callable[[Batch], Options]] = {
    "composited": {"policy": Constant(lock=0.0), "composite": 1.0},
    "composited, 32 steps": {"policy": Constant(lock=0.0), "composite": 1.0, "steps": 32},
    "composited, 8 steps": {"policy": Constant(lock=0.0), "composite": 1.0, "steps": 8},
    "composited, lock 1": {"policy": Constant(lock=1.0)},
    "composited, lock 0.5, erased": {"policy": Constant(lock=0.5), "erase": True},
    "lock 0.5, never composited": {"policy": Constant(lock=0.5, composite=0.0), "erase": True},
    "composited, larger mask": larger_mask(policy=Constant(lock=0.0), composite=1.0),
    "composited, larger mask, lock 0.5, erased": larger_mask(policy=Constant(lock=0.5), erase=True),
    "static": STATIC,
    "static, 21 steps": STATIC | {"steps": 21},
    "static, below 3, lock 0.5": STATIC | {"policy": ReleaseBelow(below=3.0, lock=0.5)},
    "static without the lock": {"policy": ReleaseBelow(below=2.0, lock=0.0), "reach": 0.5},
    "static, anywhere": ANYWHERE,
    "static, anywhere, below 2": ANYWHERE | {"policy": ReleaseBelow(below=2.0, lock=0.5)},
    "static, anywhere, lock 0.75": ANYWHERE | {"policy": ReleaseBelow(below=3.0, lock=0.75)},
    "static, anywhere, lock 1": ANYWHERE | {"policy": ReleaseBelow(below=3.0, lock=1.0)},
    "static, anywhere, 21 steps": ANYWHERE | {"steps": 21},
    "static, anywhere, not erased": ANYWHERE | {"erase": False},
    "static, anywhere, without the lock": {"policy": ReleaseBelow(below=3.0, lock=0.0)},
    "default": {"policy": "default"},
    "default, not erased": {"policy": "default", "erase": False},
    "release": ADAPTIVE,
    "release, not erased": {"policy": "release", "erase": False},
    "release, reach 0.5": ADAPTIVE | {"reach": 0.5},
    "release, lock kept": {
        "policy": Release(firm=1e6),
        "estimator": Divergence(patch=PATCH),
        "erase": True,
    },
    "static, anywhere, old object unseen": unseen(policy=ReleaseBelow(below=3.0, lock=0.5)),
    "release, old object unseen": unseen(policy="release"),
    "release at random": shuffled,
    "released where the effects are": lambda batch: {"policy": Where(tokens(batch.effect)), "erase": True},
}
SEARCHED: dict[str, Options | Callable[[Batch], Options]] = {
    f"below {below:g}, lock {lock:g}, erased": {"policy": ReleaseBelow(below=below, lock=lock), "erase": True}
    for below in (1.0, 2.0, 3.0, 5.0)
    for lock in (0.25, 0.5, 0.75, 1.0)
} | {
    f"below {below:g}, lock {lock:g}, reach {reach:g}, erased": {
        "policy": ReleaseBelow(below=below, lock=lock),
        "erase": True,
        "reach": reach,
    }
    for reach, below, lock in (
        *((reach, 3.0, 0.5) for reach in (0.2, 0.35, 0.5, 0.75, 1.0)),
        *((0.5, below, 0.5) for below in (1.0, 2.0, 5.0)),
        *((0.5, 3.0, lock) for lock in (0.25, 0.75, 1.0)),
        (0.5, 2.0, 0.25),
    )
}


@torch.no_grad()
def edit(
    network: nn.Module, batch: Batch, options: Options, sampler: str, seed: int = 0, steps: int = STEPS
) -> tuple[Tensor, kv.Trace]:
    """Edit a batch under one row's options, on the network's device."""
    device = next(network.parameters()).device
    options = {"source_args": {"cond": tokenize([scene.prompt for scene in batch.sources])}, **options}
    steps = options.pop("steps", steps)
    source, noise, mask = (part.to(device) for part in (batch.source, batch.noise, options.pop("mask", batch.mask)))
    lock = kv.KVLock(FlowDenoiser(network, prediction="x0"), source=source, mask=mask, **options)
    cond = tokenize([scene.prompt for scene in batch.targets])
    args = {"cond": cond, "uncond": torch.zeros_like(cond), "cond_scale": CFG_SCALE}
    sigmas = samplers.flow_sigmas(steps, shift=3.0, t_max=0.98).to(device)
    noise = noise if seed == 0 else noise.flip(-1).roll(seed, -1)
    out = lock.sample(sampler, noise * sigmas[0], sigmas, extra_args=args, seed=seed, disable=True)
    return out.clamp(-1, 1).cpu(), lock.trace


def psnr(clips: Tensor, targets: Tensor, region: Tensor | None = None) -> list[float]:
    """PSNR in dB of each clip over a region; NaN for an empty one."""
    region = torch.ones_like(clips[:, :1]) if region is None else region
    error = (((clips - targets) / 2).square().mean(1, keepdim=True) * region).flatten(1).sum(1)
    return (-10 * torch.log10((error / region.flatten(1).sum(1)).clamp_min(1e-10))).tolist()


def scored(batch: Batch, clips: Tensor) -> list[dict[str, float]]:
    """The scores of each edit, by the names of SCORES."""
    found = [psnr(clips, batch.target, region) for region in (None, batch.mask, batch.effect, batch.rest)]
    verdicts = judge_edits(clips, batch.sources, batch.targets)
    judged = [(v.effect, float(v.right), float(v.intruder)) for v in verdicts]
    rows = zip(*found, *zip(*judged, strict=True), strict=True)
    return [{name: round(value, 3) for name, value in zip(SCORES, row, strict=True)} for row in rows]


def measure(
    network: nn.Module, row: Any, edits: Iterable[Batch], sampler: str, seed: int, steps: int
) -> dict[str, Any]:
    scores: list[dict[str, float]] = []
    started, passes = time.perf_counter(), []
    for batch in edits:
        clips, trace = edit(network, batch, row(batch) if callable(row) else row, sampler, seed, steps)
        scores += scored(batch, clips)
        passes.append(trace.nfe)
    columns = {name: [score[name] for score in scores] for name in SCORES}
    return {"passes": round(mean(passes)), "seconds": round(time.perf_counter() - started, 1), **columns}


def mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / max(1, len(known))


def difference(row: list[float], base: list[float]) -> str:
    """Mean difference and its standard error, paired by edit."""
    gaps = torch.tensor(row, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    return f"{float(gaps.mean()):+.2f} ± {float(gaps.std() / len(gaps) ** 0.5):.2f}"


def table(rows: dict[str, Any], kinds: list[str]) -> str:
    """The rows as Markdown, each with its difference to the first."""
    base = next(iter(rows))
    titles = ["background", "all", f"to {base}", "mask", "effect", "rest", *EDITS, "leftover", "right", "passes"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name, row in rows.items():
        by_kind = [mean([v for v, kind in zip(row["all"], kinds, strict=True) if kind == each]) for each in EDITS]
        cells = [f"{mean(row['all']):.2f}", difference(row["all"], rows[base]["all"])]
        cells += [f"{mean(row[region]):.1f}" for region in ("mask", "effect", "rest")]
        cells += [f"{value:.1f}" for value in by_kind]
        cells += [f"{mean(row['leftover']):.2f}", f"{mean(row['right']):.0%}", str(row["passes"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


CONTROLS = (
    "composited",
    "composited, 32 steps",
    "static",
    "static, 21 steps",
    "static, below 3, lock 0.5",
    "static, anywhere",
    "static, anywhere, below 2",
    "static, anywhere, lock 0.75",
    "static, anywhere, lock 1",
    "default",
    "release, lock kept",
    "release at random",
    "released where the effects are",
)


def report(record: dict[str, Any]) -> str:
    """The table of a record, `release` against each control, and how far it goes towards the best row per edit."""
    about, known = record["about"], [*ROWS, *SEARCHED]
    rows = {name: record["rows"][name] for name in sorted(record["rows"], key=known.index)}
    first, count = about["first_scene"], about["edits"]
    kinds = [EDITS[seed % len(EDITS)] for seed in range(first, first + count)]
    parts = [
        f"{count} held-out edits of the stage, {about['sampler']}, {about['steps']} steps, guidance {CFG_SCALE:g}"
        f"{', matrix products in bfloat16' * about['bfloat16']}. PSNR in dB against the true render: of whole frames, "
        "apart in the mask, in the effect region (outside it, where the true edit differs from the source) and "
        "in the rest. *Leftover*: how much of the source's effect is left in the effect region, 1 = all. *Right*: the "
        "judge reads every attribute of the target, and nothing is there that should not be. Passes are per clip, in "
        f"batches of {BATCH}. "
        "± standard error, paired by scene and noise.",
        table(rows, kinds),
    ]
    if "release" in rows:
        mine = rows["release"]["all"]
        against = [f"{name} {difference(mine, rows[name]['all'])}" for name in CONTROLS if name in rows]
        parts.append("`release` against controls, dB: " + "; ".join(against) + ".")
        fixed = [rows[name]["all"] for name in rows if name.startswith(("composited", "static", "lock"))]
        best, static = [max(values) for values in zip(*fixed, strict=True)], rows["static"]["all"]
        share = (mean(mine) - mean(static)) / (mean(best) - mean(static))
        parts.append(
            f"The best row without a measurement, chosen per edit with the truth at hand, has {mean(best):.2f} dB; "
            f"`release` goes {share:.0%} of the way from `static` to it."
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--search", action="store_true", help="the grid of static schedules, on other scenes")
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the rows that do not say otherwise")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--name", default="release", help="of the results' files")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    network: nn.Module = load(device=given.device).network
    network = Unseen(Bfloat16(network) if given.bfloat16 else network)
    first = SEARCHED_SCENE if given.search else FIRST_SCENE
    path = RESULTS / f"{given.name}{'_search' * given.search}.json"
    about = {
        "first_scene": first,
        "edits": given.edits,
        "sampler": given.sampler,
        "steps": given.steps,
        "seed": given.seed,
    }
    about["bfloat16"] = given.bfloat16
    record = json.loads(path.read_text()) if path.exists() else {"about": about, "rows": {}}
    if record["about"] != about:
        parser.error(f"{path.name} holds {record['about']}, asked for {about}; remove it, or pass another --name.")
    edits = list(batches(first, given.edits))
    for name, row in (SEARCHED if given.search else ROWS).items():
        if name in record["rows"] or (given.only and name not in given.only):
            continue
        found = measure(network, row, edits, given.sampler, given.seed, given.steps)
        with open(path.with_suffix(".lock"), "w") as held:  # another process may add rows
            fcntl.flock(held, fcntl.LOCK_EX)
            record = json.loads(path.read_text()) if path.exists() else record
            record["rows"][name] = found
            write_atomically(path, json.dumps(record) + "\n")
        print(
            f"{name}: {mean(record['rows'][name]['all']):.2f} dB, {record['rows'][name]['seconds']:.0f} s", flush=True
        )
    if given.only:
        return  # the table is of all rows: call it without --only at the end
    text = report(record)
    write_atomically(path.with_suffix(".md"), text + "\n")
    print(text)


if __name__ == "__main__":
    main()
