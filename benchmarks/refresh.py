"""When should the source's keys and values be evaluated anew?  python benchmarks/refresh.py [--scenes 12]

The drift of a source's keys and values over noise levels is known before a run. For clips of the stage this takes the
Gram matrix of all levels' background keys and values, layer by layer, from which the error of any combination of levels
follows. A schedule says at which evaluations the source runs; in between the nearest level above serves, or the line in
log sigma through the last two. Dynamic programming finds the best schedule of so many passes; beside it stand every
n-th evaluation, equal steps in log sigma, a ratio with the line at most twice beyond its ends (the library's rule), and
random ones. The searched schedule comes from other clips than those that it is judged on, and also from another sampler
schedule. Error: relative RMS over layers, averaged over the evaluations. Writes benchmarks/results/refresh.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

import kvlock_sampling as kv
from kvlock_sampling.kv_cache.refresh import Refresh
from kvlock_sampling.samplers import flow_sigmas
from kvlock_sampling.tiny import edit_mask, load, render, sample_edit
from kvlock_sampling.tiny.world import EDITS
from kvlock_sampling.utils.files import write_atomically

RESULT = Path(__file__).resolve().parent / "results/refresh.json"
FIRST_SCENE = 830_000


@torch.inference_mode()
def grams(sigmas: list[float], first: int, count: int) -> np.ndarray:
    """Gram matrices of the levels' K/V, (clips, tensors, levels, levels), each divided by its mean diagonal."""
    video, found = load(), []
    for i in range(count):
        source, target = sample_edit(first + i, EDITS[i % len(EDITS)])
        clip, mask = render([source]), edit_mask([source], [target])
        # A cache that stores every level unchanged: what it holds is what the lock would use.
        cache = kv.KVCache(budget=None, format=None, every=1, ratio=1.0)
        lock = kv.KVLock(
            video.denoiser, source=clip, mask=mask, policy=kv.Constant(lock=1.0), noise="fixed", kv_cache=cache
        )
        noise = lock.settings.source.noise
        with lock:
            for sigma in sigmas:
                lock(clip + sigma * noise, torch.tensor([sigma]), cond=video.prompt([source.prompt]))
        levels = {sigma: level for (_, sigma), level in cache.memory._levels.items()}
        layers = list(levels[sigmas[0]])
        tensors = []
        for layer, side in itertools.product(layers, (0, 1)):
            rows = torch.stack([levels[s][layer][side][1]["values"].flatten().double() for s in sigmas])
            gram = rows @ rows.T
            tensors.append((gram / gram.diagonal().mean()).numpy())
        found.append(np.stack(tensors))
    return np.stack(found)


def error(gram: np.ndarray, weights: dict[int, float], at: int) -> float:
    """Relative RMS error of a combination of levels in place of level `at`, mean over clips and tensors."""
    v = np.zeros(gram.shape[-1])
    for level, weight in weights.items():
        v[level] += weight
    v[at] -= 1
    square = np.einsum("i,ctij,j->ct", v, gram, v) / gram[..., at, at]
    return float(np.sqrt(np.maximum(square, 0)).mean())


def served(sigmas: list[float], chosen: list[int], at: int, line: bool) -> dict[int, float]:
    """The levels that serve an evaluation under a schedule: the last one, or the line through the last two."""
    past = [level for level in chosen if level <= at]
    if past[-1] == at or len(past) < 2 or not line:
        return {past[-1]: 1.0}
    a, b = sigmas[past[-2]], sigmas[past[-1]]
    weight = min(math.log(sigmas[at] / a) / math.log(b / a), 2.0)
    return {past[-2]: 1 - weight, past[-1]: weight}


def cost(gram: np.ndarray, sigmas: list[float], chosen: list[int], line: bool) -> float:
    return float(np.mean([error(gram, served(sigmas, chosen, at, line), at) for at in range(len(sigmas))]))


def search(gram: np.ndarray, sigmas: list[float], passes: int, line: bool) -> list[int]:
    """The schedule of so many passes with the least error: dynamic programming over the last two passes."""
    n = len(sigmas)

    def segment(before: int | None, last: int, end: int) -> float:
        """Error of the evaluations from `last` up to `end`, not counted."""
        chosen = [last] if before is None else [before, last]
        return sum(error(gram, served(sigmas, chosen, at, line), at) for at in range(last, end))

    known = {
        (before, last, end): segment(before, last, end)
        for last in range(n)
        for before in [None, *range(last)]
        for end in range(last + 1, n + 1)
    }
    best: dict[tuple[int | None, int], tuple[float, list[int]]] = {(None, 0): (0.0, [0])}
    for _ in range(passes - 1):
        grown: dict[tuple[int | None, int], tuple[float, list[int]]] = {}
        for (before, last), (spent, path) in best.items():
            for following in range(last + 1, n):
                total = spent + known[before, last, following]
                key = (last, following)
                if key not in grown or total < grown[key][0]:
                    grown[key] = total, [*path, following]
        best = grown
    return min(((spent + known[b, last, n], path) for (b, last), (spent, path) in best.items()))[1]


def by_rule(sigmas: list[float], rule: Refresh) -> list[int]:
    """The evaluations at which the library's rule runs the source."""
    requested, stored, chosen = [], [], []
    for i, sigma in enumerate(sigmas):
        requested.append(sigma)
        if not rule.choose(stored, sigma, requested, stored):
            stored.append(sigma)
            chosen.append(i)
    return chosen


def equal_steps(sigmas: list[float], passes: int) -> list[int]:
    """Evaluations nearest to equal steps in log sigma."""
    logs = np.log(sigmas)
    wanted = np.linspace(logs[0], logs[-1], passes + 1)[:-1]
    return sorted({int(np.abs(logs - level).argmin()) for level in wanted} | {0})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    given = parser.parse_args()
    schedule = [float(s) for s in flow_sigmas(given.steps, shift=3.0, t_max=0.98) if s > 0]
    other = [float(s) for s in flow_sigmas(given.steps, shift=5.0, t_max=0.98) if s > 0]
    half = given.scenes // 2
    gram, theirs = grams(schedule, FIRST_SCENE, given.scenes), grams(other, FIRST_SCENE, half)
    learnt, judged = gram[:half], gram[half:]
    record: dict = {"scenes": given.scenes, "steps": given.steps, "first_scene": FIRST_SCENE, "rows": []}
    rng = np.random.default_rng(0)
    for passes in (6, 8, 10, 15):
        for line in (False, True):
            every = next(n for n in range(1, 31) if len(range(0, given.steps, n)) <= passes)
            found = search(learnt, schedule, passes, line)
            # A schedule of another sampler's levels, taken over by noise level.
            abroad = [other[i] for i in search(theirs, other, passes, line)]
            taken = sorted({int(np.abs(np.log(np.array(schedule) / s)).argmin()) for s in abroad} | {0})
            random = [
                cost(judged, schedule, sorted({0, *rng.choice(np.arange(1, given.steps), passes - 1, False)}), line)
                for _ in range(20)
            ]
            ways = {
                "searched": found,
                "searched on another schedule": taken,
                "every n-th": list(range(0, given.steps, every)),
                "equal steps in log sigma": equal_steps(schedule, passes),
            }
            row = {"passes": passes, "line": line, "at random": round(float(np.mean(random)), 4)}
            row |= {
                name: [len(chosen), round(cost(judged, schedule, chosen, line), 4)] for name, chosen in ways.items()
            }
            row["the searched levels"] = [round(schedule[i], 3) for i in found]
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
    for rule in (Refresh(3, 1.5), Refresh(3, None), Refresh(None, 1.5), Refresh(None, 1.3), Refresh(None, 1.2)):
        chosen = by_rule(schedule, rule)
        row = {"rule": str(rule), "passes": len(chosen), "line": round(cost(judged, schedule, chosen, True), 4)}
        searched = search(learnt, schedule, len(chosen), True)
        row["searched, as many"] = round(cost(judged, schedule, searched, True), 4)
        record["rows"].append(row)
        print(json.dumps(row), flush=True)
    if not given.dry:
        write_atomically(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
