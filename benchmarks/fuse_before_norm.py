"""Fusing keys as the paper writes it, or at the attention call:  python benchmarks/fuse_before_norm.py [--scenes 16]

The paper fuses K = W_K h, before qk-norm and rotary embedding; this library fuses what attention is given, after both.
V has neither, so V is the same. For a lock strictly between 0 and 1 the keys differ. Measured on the model of the first
world, which is a Wan: keys of one evaluation, at every layer, from the same inputs; x0-hat of one evaluation; whole
edits from the same noise. Writes benchmarks/results/fuse_before_norm.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from first_world import EDITS, FIRST_WORLD, load, sample_edit
from torch import Tensor, nn
from world.compare import Task, make_task

import kvlock_sampling as kv
from kvlock_sampling import samplers
from kvlock_sampling.masks.fitted import FittedMask
from kvlock_sampling.utils.files import write_atomically
from kvlock_sampling.video.metrics import masked_psnr

ROOT = Path(__file__).resolve().parent.parent
FIRST_SCENE = 740_000
LOCKS = (0.25, 0.5, 0.75)
SIGMAS = (12.0, 4.0, 1.5, 0.5)


class FusedBeforeNorm(nn.Module):
    """A guided denoiser whose background K = W_K h and V = W_V h are blended with the source's, as the paper writes it.

    The source rides as the last rows of one call [uncond, cond, source], at the same noise level and with `noise`, and
    the result's background is the source's own: all but the place of the blend is as `KVLock` does it.
    """

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList, source: Tensor, mask: Tensor, noise: Tensor, patch: Any
    ) -> None:
        super().__init__()
        self.model, self.blocks = model, blocks
        self.source, self.noise, self.lock = source, noise, 0.0
        region = FittedMask(mask)
        self.edited = region.latent(source)
        self.background = region.background(source, patch)

    def forward(self, x: Tensor, sigma: Tensor, cond: Any, uncond: Any, cond_scale: float) -> Tensor:
        rows = torch.cat([x, x, self.source + sigma.view(-1, 1, 1, 1, 1) * self.noise])
        with self._blending():
            out = self.model(rows, sigma.repeat(3), cond=torch.cat([uncond, cond, cond]))
        unguided, guided, _ = out.chunk(3)
        return torch.lerp(self.source, unguided + (guided - unguided) * cond_scale, self.edited)

    @contextmanager
    def _blending(self) -> Iterator[None]:
        weight = (self.lock * self.background).expand(len(self.source), -1).repeat(2, 1).unsqueeze(-1)

        def blend(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
            edit, source = out[: 2 * len(self.source)], out[2 * len(self.source) :]
            return torch.cat([torch.lerp(edit, source.repeat(2, 1, 1), weight), source])

        with ExitStack() as stack:
            for block in self.blocks:
                for projection in (block.attn1.to_k, block.attn1.to_v):
                    stack.callback(projection.register_forward_hook(blend).remove)
            yield


class Setting(NamedTuple):
    """Clips to edit and what both forms are given."""

    task: Task
    model: nn.Module
    blocks: nn.ModuleList
    patch: tuple[int, int, int]
    noise: Tensor
    sigmas: Tensor
    extra_args: Mapping[str, Any]

    def before(self, lock: float) -> FusedBeforeNorm:
        """The paper's form."""
        form = FusedBeforeNorm(self.model, self.blocks, self.task.source, self.task.mask, self.implied, self.patch)
        form.lock = lock
        return form

    def call(self, lock: float) -> kv.KVLock:
        """This library's."""
        return kv.KVLock(
            self.model,
            source=self.task.source,
            mask=self.task.mask,
            noise=self.implied,
            policy=kv.Constant(lock=lock),
            composite=True,
            foreground=False,
        )

    @property
    def implied(self) -> Tensor:
        """The noise that leads from the source to the run's first x."""
        return (self.noise * self.sigmas[0] - self.task.source) / self.sigmas[0]


def make_setting(scenes: int, steps: int) -> Setting:
    """Scenes that were not trained on, edits of every kind."""
    video = load()
    task = make_task([sample_edit(FIRST_SCENE + i, EDITS[i % len(EDITS)]) for i in range(scenes)], FIRST_WORLD)
    noise = torch.randn(task.source.shape, generator=torch.Generator().manual_seed(FIRST_SCENE))
    words = {"cond": video.prompt(task.prompts), "uncond": video.prompt([""] * scenes), "cond_scale": 3.0}
    return Setting(
        task, video.denoiser, video.network.transformer.blocks, video.patch, noise, video.sigmas(steps), words
    )


def keys(setting: Setting, lock: float, sigma: float) -> list[dict[str, float]]:
    """Background keys of both forms from the same inputs, at every layer: those of one evaluation without a lock, of
    the true result and of the source under the run's noise.

    shorter: 1 - |K_call| / |K_before|, mean over tokens and heads.  angle: between them, degrees.
    apart: |K_call - K_before| / |K_before|.  alike: cosine of the edit's and the source's own keys.
    Rotary embedding turns both alike and is left out.
    """
    x = setting.task.truth + sigma * setting.implied
    raw: list[Tensor] = []
    hooks = [b.attn1.to_k.register_forward_hook(lambda m, a, out: raw.append(out)) for b in setting.blocks]
    both = torch.cat([x, setting.task.source + sigma * setting.implied])
    setting.model(both, torch.full((len(both),), sigma), cond=setting.extra_args["cond"].repeat(2, 1))
    for hook in hooks:
        hook.remove()
    kept = FittedMask(setting.task.mask).background(x, setting.patch).expand(len(x), -1) > 0
    rows = []
    for block, out in zip(setting.blocks, raw, strict=True):
        edit, source = out.chunk(2)
        norm, heads = block.attn1.norm_k, block.attn1.heads
        call = torch.lerp(norm(edit), norm(source), lock)[kept].unflatten(-1, (heads, -1))
        before = norm(torch.lerp(edit, source, lock))[kept].unflatten(-1, (heads, -1))
        own, theirs = (norm(part)[kept].unflatten(-1, (heads, -1)) for part in (edit, source))
        cosine = torch.cosine_similarity(call, before, dim=-1)
        length = before.norm(dim=-1).clamp(min=1e-9)
        rows.append(
            {
                "shorter": float((1 - call.norm(dim=-1) / length).mean()),
                "angle": float(cosine.clamp(-1, 1).arccos().rad2deg().mean()),
                "apart": float(((call - before).norm(dim=-1) / length).mean()),
                "alike": float(torch.cosine_similarity(own, theirs, dim=-1).mean()),
            }
        )
    return rows


def evaluation(setting: Setting, lock: float, sigma: float) -> dict[str, float]:
    """x0-hat in the mask, both forms at one point of the trajectory: root mean squares, pixels in [-1, 1].

    The point is the truth under the run's noise at this level, as near as an edit comes.
    """
    x = setting.task.truth + sigma * setting.implied
    level = torch.full((len(x),), sigma)
    before = setting.before(lock)(x, level, **setting.extra_args)
    with setting.call(lock) as locked, setting.call(0.0) as free:
        call = locked(x, level, **setting.extra_args)
        plain = free(x, level, **setting.extra_args)
    inside = setting.before(lock).edited.expand_as(x) > 0
    return {
        "forms apart": _rms((call - before)[inside]),
        "effect of the lock": _rms((call - plain)[inside]),
    }


def edits(setting: Setting, lock: float, free: Tensor) -> dict[str, Any]:
    """Whole edits in both forms: how far apart, how far from the one without a lock, `free`, and from the truth."""
    start = setting.noise * setting.sigmas[0]
    given = {"extra_args": dict(setting.extra_args)}
    before = samplers.run("dpmpp_2m", setting.before(lock), start, setting.sigmas, **given).clamp(-1, 1)
    call = setting.call(lock).sample("dpmpp_2m", start, setting.sigmas, **given).clamp(-1, 1)
    inside = setting.before(lock).edited.expand_as(call) > 0
    gain = _psnr(setting.task, call) - _psnr(setting.task, before)
    return {
        "forms apart": _rms((call - before)[inside]),
        "effect of the lock": _rms((call - free)[inside]),
        "in-mask PSNR at the call": float(_psnr(setting.task, call).mean()),
        "in-mask PSNR before the norm": float(_psnr(setting.task, before).mean()),
        "gain of the call": float(gain.mean()),
        "error of the gain": float(gain.std() / len(gain) ** 0.5),
        "right at the call": _right(setting.task, call),
        "right before the norm": _right(setting.task, before),
    }


def ends_agree(setting: Setting) -> tuple[dict[str, float], Tensor]:
    """At lock 0 and 1 both forms are one: the largest deviation of a whole edit, and the edit without a lock."""
    start = setting.noise * setting.sigmas[0]
    given = {"extra_args": dict(setting.extra_args)}
    apart, results = {}, []
    for lock in (0.0, 1.0):
        before = samplers.run("dpmpp_2m", setting.before(lock), start, setting.sigmas, **given)
        results.append(setting.call(lock).sample("dpmpp_2m", start, setting.sigmas, **given))
        apart[str(lock)] = float((results[-1] - before).abs().max())
    return apart, results[0].clamp(-1, 1)


def _psnr(task: Task, pixels: Tensor) -> Tensor:
    return masked_psnr(pixels, task.truth, task.mask)


def _right(task: Task, pixels: Tensor) -> float:
    """Share of the edits that show the object of the prompt, by the judge."""
    verdicts = zip(FIRST_WORLD.judge(pixels), task.targets, strict=True)
    return sum(v.shape == t.shape and (t.shape is None or v.colour == t.colour) for v, t in verdicts) / len(pixels)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    given = parser.parse_args()
    with torch.no_grad():
        setting = make_setting(given.scenes, given.steps)
        record: dict[str, Any] = {"scenes": given.scenes, "first_scene": FIRST_SCENE, "steps": given.steps}
        record["ends"], free = ends_agree(setting)
        print("ends:", record["ends"], flush=True)
        record["keys"] = {str(lock): {str(sigma): keys(setting, lock, sigma) for sigma in SIGMAS} for lock in LOCKS}
        record["evaluation"] = {
            str(lock): {str(sigma): evaluation(setting, lock, sigma) for sigma in SIGMAS} for lock in LOCKS
        }
        record["edits"] = {}
        for lock in LOCKS:
            record["edits"][str(lock)] = edits(setting, lock, free)
            print(lock, json.dumps(record["edits"][str(lock)]), flush=True)
    for lock, at in record["keys"].items():
        for sigma, layers in at.items():
            means = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
            print("keys", lock, sigma, {k: round(v, 4) for k, v in means.items()})
            print("evaluation", lock, sigma, {k: round(v, 5) for k, v in record["evaluation"][lock][sigma].items()})
    if not given.dry:
        write_atomically(
            ROOT / "benchmarks/results/fuse_before_norm.json", json.dumps(_rounded(record), indent=1) + "\n"
        )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
