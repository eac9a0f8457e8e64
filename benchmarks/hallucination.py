"""Which estimator sees hallucinations, and what controlling them costs:  python benchmarks/hallucination.py

The 2D Gaussian grid of `grid.py`, trained networks, three seeds. Detection: AUROC, recall at 96% retention, specificity
at 95% recall, effect size and extra evaluations, for every estimator, sampler and number of steps. The paper's own
setting: `grid_paper.py`. Control: `grid_control.py`. Writes benchmarks/results/hallucination.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from grid import SHARP, Grid, GridDenoiser, label, train
from grid_control import control
from grid_paper import paper_setting
from grid_runs import PROBES, detection, karras, read, run

from kvlock_sampling.utils.files import write_atomically

RESULT = Path(__file__).resolve().parent / "results/hallucination.json"


@torch.inference_mode()
def detect(grid: Grid, seeds: int, count: int, say: Callable[[str], None]) -> list[dict]:
    """Every estimator, sampler and number of steps, one row for each network."""
    rows = []
    for seed in range(seeds):
        model = GridDenoiser(train(grid, seed), grid)
        settings = [(n, s, karras(n, grid)) for n in (20, 50, 100) for s in ("euler", "euler_ancestral", "dpmpp_2m")]
        levels = torch.cat([model.log_sigmas.exp().flip(0), torch.zeros(1)])
        settings.append((len(levels) - 1, "euler_ancestral over the training levels", levels))
        for steps, name, sigmas in settings:
            whole = " " in name
            samples, record = run(model, name.split()[0], sigmas, count // 2 if whole else count, seed)
            judged = label(grid, samples)
            rate = float(judged.hallucinated.float().mean())
            say(f"seed {seed} {name} {steps}: {rate:.2%} hallucinated")
            for title, probe in PROBES.items():
                score, extra = read(probe, record.calls, model)
                common = {"seed": seed, "sampler": name, "steps": steps, "estimator": title, "rate": rate}
                rows.append(
                    {**common, "extra_evaluations": extra / steps, **detection(score, judged.hallucinated)},
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--std", type=float, choices=(0.05, 0.02), help="one of the two grids; keeps the other's rows")
    parser.add_argument("--only", choices=("detection", "paper", "control"), help="one part; keeps the other rows")
    given = parser.parse_args()
    results = json.loads(RESULT.read_text()) if (given.std or given.only) and RESULT.exists() else {}

    def say(line: str) -> None:
        print(line, flush=True)

    parts = {
        "detection": lambda grid: detect(grid, given.seeds, given.samples, say),
        "paper": lambda grid: paper_setting(grid, given.seeds, 2 * given.samples),
        "control": lambda grid: control(grid, given.seeds, given.samples, say),
    }
    for grid in (Grid(), SHARP):
        if given.std in (None, grid.std):
            rows = results.setdefault(f"std {grid.std}, betas {grid.beta_start} to {grid.beta_end}", {})
            rows["training_steps"] = grid.training
            rows |= {name: part(grid) for name, part in parts.items() if given.only in (None, name)}
    write_atomically(RESULT, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
