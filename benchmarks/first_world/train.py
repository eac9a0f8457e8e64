"""Train the model of the first world from scratch:  cd benchmarks; python -m first_world.train --steps 8000

Rectified flow on an endless stream of procedural scenes, on two CPU cores: x0-prediction with the loss of the implied
velocity, Muon for the block matrices, logit-normal times, and an exponential moving average of the weights. The
learning rate is held, then decays linearly over the last quarter. To extend a run, resume an earlier checkpoint with a
larger --steps.

A run can be killed at any time: every --save-every steps the state is written to a temporary name and renamed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from world.train_stage import save_weights

from kvlock_sampling.utils.files import atomic

from .model import FirstWan, tokenize
from .world import render, sample_scene

TRAIN_SEED = 1_000_000_000  # scenes below this seed are held out: tests, benchmarks and the demo draw from there
PROMPT_DROPOUT = 0.1


def learning_rate_factor(step: int, steps: int, *, warmup: int = 100, decay_fraction: float = 0.25) -> float:
    """Warm up, hold, and decay linearly to 2% over the last `decay_fraction` of the run."""
    if step < warmup:
        return (step + 1) / warmup
    start = steps * (1 - decay_fraction)
    if step < start:
        return 1.0
    return 0.02 + 0.98 * max(0.0, (steps - step) / (steps - start))


def build_optimizers(model: FirstWan, *, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = name.startswith("transformer.blocks.")
        (matrices if in_block and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adamw_lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def make_batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """Clips and prompts of this step; the same step always gives the same batch, so that resuming changes nothing."""
    scenes = [sample_scene(TRAIN_SEED + step * size + i) for i in range(size)]
    draw = torch.rand(size, generator=torch.Generator().manual_seed(step))
    prompts = ["" if draw[i] < PROMPT_DROPOUT else s.prompt for i, s in enumerate(scenes)]
    return render(scenes), tokenize(prompts)


def flow_loss(model: Callable[..., Tensor], clips: Tensor, words: Tensor, generator: torch.Generator) -> Tensor:
    """Velocity loss of an x0 prediction: (x0_hat - x0)^2 / t^2 with 1 / t clipped at 10."""
    device = clips.device
    t = torch.sigmoid(0.6 + 1.1 * torch.randn(len(clips), generator=generator)).to(device)
    noise = torch.randn(clips.shape, generator=generator).to(device)
    tt = t.view(-1, 1, 1, 1, 1)
    predicted = model((1 - tt) * clips + tt * noise, t, words)
    weight = (1 / tt).clamp(max=10).square()
    return (weight * (predicted.float() - clips).square()).mean()


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, step: int, *, decay: float = 0.999) -> None:
    """Exponential moving average with a short memory at the start."""
    keep = min(decay, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - keep)
        else:
            average[name].copy_(value)


def train(
    out: Path,
    *,
    steps: int,
    batch: int = 16,
    muon_lr: float = 2e-3,
    adamw_lr: float = 1e-3,
    device: str = "cpu",
    save_every: int = 200,
    log_every: int = 50,
    fast: bool = False,
) -> Path:
    """Train, or resume training, in the folder `out`. Returns the path of the checkpoint.

    The averaged weights are written beside it, as weights.safetensors: load them with `first_world.load`.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    torch.manual_seed(0)
    model = FirstWan().to(device)
    optimizers = build_optimizers(model, muon_lr=muon_lr, adamw_lr=adamw_lr)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average = state["average"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"].cpu())
        first = state["step"]
    base_rates = [muon_lr, adamw_lr]
    forward = torch.compile(model) if fast else model
    recent, started = [], time.time()
    for step in range(first, steps):
        factor = learning_rate_factor(step, steps)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        clips, words = make_batch(step, batch)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast):
            loss = flow_loss(forward, clips.to(device), words.to(device), generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_average(average, model, step)
        recent.append(loss.item())
        if (step + 1) % log_every == 0:
            row = {"step": step + 1, "loss": sum(recent) / len(recent), "lr": factor, "seconds": time.time() - started}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            recent.clear()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "average": average,
                "optimizers": [o.state_dict() for o in optimizers],
                "generator": generator.get_state(),
            }
            with atomic(checkpoint) as temporary:
                torch.save(state, temporary)
            save_weights(average, out / "weights.safetensors", {"step": step + 1, "batch": batch})
    return checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/first"), help="folder of the checkpoint and the log")
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fast", action="store_true", help="torch.compile and bfloat16 matrix products")
    arguments = parser.parse_args()
    train(
        arguments.out,
        steps=arguments.steps,
        batch=arguments.batch,
        device=arguments.device,
        fast=arguments.fast,
    )


if __name__ == "__main__":
    main()
