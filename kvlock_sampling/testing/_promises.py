"""The promises that `check_layers` tests, at one noise level and in one precision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import _len_torch_function_stack

from ..attention import AttentionLayers, FusionContext, Hooks
from ..attention.context import KeyValue
from ..batching import take
from ..lock import KVLock
from ..masks.fitted import FittedMask
from ..masks.tokens import Grid, on_latents, token_grid
from ..policy import Constant, Policy, stateless
from ..source import Source
from ..types import AttentionError, Control, Denoiser
from ..utils.denoiser import method_of, parameters_of
from ..utils.modules import reachable_modules

# Largest deviation that counts as rounding, in standard deviations of the output.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class Seen(NamedTuple):
    """One attention call of a layer: `own` and `used` are (rows, ..., length, dim), before and after fusion."""

    layer: str
    turn: int
    clips: list[int]
    start: int
    ratio: Tensor
    own: KeyValue
    used: KeyValue


@dataclass(frozen=True)
class _Spy(FusionContext):
    seen: list[Seen] = field(default_factory=list)

    def process(self, layer: str, key: Tensor, value: Tensor, start: int, ratio: Tensor) -> KeyValue:
        used = super().process(layer, key, value, start, ratio)
        # A layer that handles rows one by one passes one clip, and is named "layer[clip]".
        clips = list(range(len(ratio))) if len(ratio) == len(self.ratio) else [int(layer[:-1].rsplit("[", 1)[1])]
        chunks, turn = len(key) // len(clips), sum(seen.layer == layer for seen in self.seen)
        own = key.clone(), value.clone()
        self.seen.append(Seen(layer, turn, clips * chunks, start, ratio.repeat(chunks, 1), own, used))
        return used


class Promises:
    def __init__(
        self, model: Denoiser, layers: AttentionLayers, x: Tensor, extra_args: dict[str, Any], level: float
    ) -> None:
        self.model, self.layers, self.extra_args, self.level = model, layers, extra_args, level
        self.sigma = torch.full((len(x),), level, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        generator = torch.Generator().manual_seed(0)
        self.source, self.noise, other, noise = (
            torch.randn(x.shape, generator=generator, device="cpu", dtype=torch.float64).to(x) for _ in range(4)
        )
        noised = Source(self.source, add_noise=method_of(model, "add_noise")).at
        self.x, self.z = noised(other, level, noise), noised(self.source, level, self.noise)
        self.mask = _two_masks(x, layers)
        self.tolerance = _ROUNDING.get(x.dtype, 1e-3)
        self.fired: set[str] = set()
        self.guides = "cond" in extra_args and "uncond" in extra_args  # the model does its own guidance
        self.guidable = "cond" in extra_args and not self.guides and "uncond" not in parameters_of(model)

    def keep(self, expected: int | None, *, all_of_them: bool) -> set[str]:
        """Test all promises, or only those that depend on precision; return the names of the layers that fired."""
        before, depth = _module_state(self.model), _len_torch_function_stack()
        self.plain = self._bare(self.x)
        self._same(self._bare(self.x), "the same call", "model.eval() turns dropout off.")
        self._clips_apart()
        self._places()
        self._off()
        self._keys_and_values(expected)
        self._self_consistent()
        if all_of_them:
            self._ways_agree()
            self._clips_locked_apart()
            self._left_out()
        changed = [name for name, state in _module_state(self.model).items() if state != before.get(name)]
        if changed or _len_torch_function_stack() != depth:
            where = some(changed) or "the stack of torch functions"
            raise AttentionError(f"after the block something stayed behind on {where}; expected every hook gone.")
        return self.fired

    def _clips_apart(self) -> None:
        advice = "Tensors of extra_args that belong to clips need the batch as their first axis."
        for clip in range(len(self.x)):
            alone, together = self._bare(self.x[clip : clip + 1], clip), self.plain[clip : clip + 1]
            what = f"the bare model gives clip {clip} alone another answer than in a batch, without any lock"
            self._close(alone, together, what, advice)

    def _places(self) -> None:
        """Change one token of every clip: its own keys and values must be those that change most."""
        grid = token_grid(self.x.shape, self.layers.patch)
        own = self._spy("capture", self.x).seen
        t, h, w = (size - 1 for size in grid)
        hits: dict[str, tuple[Seen, list[tuple[Grid, int, int | None]]]] = {}
        for corners in ([(0, h, 0), (t, 0, w)], [(t, 0, w), (0, h, 0)], [(t // 2, h // 2, w), (0, 0, 0)]):
            places = [corners[clip % 2] for clip in range(len(self.x))]
            changed = self._spy("capture", _moved(self.x, places, self.layers.patch)).seen
            for before, after in zip(own, changed, strict=True):
                squares = [(b.float() - a.float()).square().sum(-1) for a, b in zip(before.own, after.own, strict=True)]
                change = torch.stack([s.reshape(len(s), -1, s.shape[-1]).sum(1) for s in squares]).sum(0)
                for clip, moved in zip(before.clips, change, strict=True):
                    i, j, k = places[clip]
                    wanted = before.start + (i * grid[1] + j) * grid[2] + k
                    where = int(moved.argmax()) if moved.any() else None
                    hits.setdefault(before.layer, (before, []))[1].append((places[clip], wanted, where))
        for seen, found in hits.values():
            _check_hits(seen, found, grid)

    def _keys_and_values(self, expected: int | None) -> None:
        source = self._spy("capture", self.z)
        edit = self._spy("inject", self.x, source.record.captured)
        # A layer may act several times: in a network that is called twice, or a layer that is used twice.
        theirs = {(s.layer, s.turn, clip): (s, row) for s in source.seen for row, clip in enumerate(s.clips)}
        for seen in edit.seen:
            for row, clip in enumerate(seen.clips):
                kept = torch.zeros(seen.own[0].shape[-2], dtype=torch.bool, device=seen.ratio.device)
                kept[seen.start : seen.start + seen.ratio.shape[1]] = seen.ratio[row] > 0
                their, their_row = theirs.get((seen.layer, seen.turn, clip), (None, 0))
                for i, which in enumerate(("keys", "values")):
                    own, used = seen.own[i][row], seen.used[i][row]
                    what = f"layer {seen.layer!r}: at lock 1 {which} of"
                    if not torch.equal(used[..., ~kept, :], own[..., ~kept, :]):
                        raise AttentionError(f"{what} edited or text tokens are not exactly the edit's own.")
                    if their is not None and not torch.equal(used[..., kept, :], their.own[i][their_row][..., kept, :]):
                        raise AttentionError(f"{what} background tokens are not exactly the source's.")
        self.fired |= edit.record.fired
        fused, ran = len(edit.record.fired), len(source.record.fired)
        if edit.record.fired != source.record.fired or expected not in (None, fused):
            wanted, names = ran if expected is None else expected, some(sorted(edit.record.fired))
            raise AttentionError(
                f"{fused} layers were fused in one evaluation at sigma={self.level}, {ran} ran for the source; "
                f"expected {wanted}. Fused: {names}."
            )

    def _off(self) -> None:
        advice = "A hook changes the model where it should do nothing: is the forward of a layer called twice?"
        self._same(self._locked(_each([0.0] * len(self.x))), "lock 0", advice)
        with self._lock(Constant(lock=1.0)) as full:
            full(self.x, self.sigma, **self.extra_args)
            self._same(self._bare(self.x), "the bare model inside the block", advice)
        self._same(self._bare(self.x), "the bare model after the block", advice)

    def _self_consistent(self) -> None:
        # A model that guides itself gets one prompt for both branches, because the source has one.
        arguments = {**self.extra_args, "uncond": self.extra_args["cond"]} if self.guides else self.extra_args
        plain, rounding = self.model(self.z, self.sigma, **arguments), 0.0
        for lock in (0.5, 1.0):
            with self._lock(Constant(lock=lock)) as locked:
                out = locked(self.z, self.sigma, **arguments)
            rounding = max(rounding, self._apart(out, plain))
            what = f"locked by {lock} to the clip it is itself, at the same noise, the output changed"
            advice = "The source's K/V went to other tokens or rows than they came from, or the model draws noise."
            self._close(out, plain, what, advice)
        if not (change := self._apart(self._locked(Constant(lock=1.0)), self.plain)) > max(1e-4, 3 * rounding):
            raise AttentionError(
                f"lock 1 to another clip changed the output by {change:.2g} standard deviations; expected more than "
                f"rounding, {rounding:.2g} here.\n  Attention has no say in this network."
            )

    def _ways_agree(self) -> None:
        if self.guides:
            return
        cases: dict[str, dict[str, Any]] = {"the source as rows of the same call, and in a pass of its own,": {}}
        if self.guidable:
            flipped = take(self.extra_args["cond"], torch.arange(len(self.x)).flip(0), len(self.x))
            cases["guidance in one call, and in one after another,"] = {"uncond": flipped, "cond_scale": 2.0}
        for what, more in cases.items():
            one, two = (self._locked(Constant(lock=0.6), **options, **more) for options in ({}, {"batched": False}))
            advice = "Rows must come as chunks of whole batches, [uncond, cond, source], and leave in the same order."
            self._close(one, two, f"{what} gave two answers", advice)

    def _clips_locked_apart(self) -> None:
        locks = [1.0 - 0.6 * (clip % 2) for clip in range(len(self.x))]
        together = self._locked(_each(locks))
        advice = "The model mixes its clips, or puts its rows in another order: it must keep chunks of whole batches."
        for clip, lock in enumerate(locks):
            what = f"clip {clip} alone came out otherwise than in a batch of {len(locks)} with other masks and locks"
            self._close(self._locked(Constant(lock=lock), clip), together[clip : clip + 1], what, advice)

    def _left_out(self) -> None:
        if not self.layers.narrows or len(self.fired) < self.layers.per_network:
            return  # KVLock then keeps all tokens, and check_layers names the layers that never ran.
        full, what = Constant(lock=1.0), "leaving fully locked tokens out of the computation"
        advice = "The architecture's flow= is not right: name every argument of a block that has one entry per token."
        every = self._locked(full, composite=True, foreground=False)
        for way in ({}, {"batched": False}):  # block by block, and with a pass of the source's own
            try:
                fewer = self._locked(full, composite=True, **way)
            except (RuntimeError, TypeError, AttributeError, IndexError) as error:
                raise AttentionError(f"{what} fails: {str(error).splitlines()[0]}\n  {advice}") from error
            self._close(fewer, every, f"{what} changed the edit", advice)
        if self.guidable:
            more = {"uncond": self._arguments(0)["cond"], "cond_scale": 2.0, "composite": True}
            fewer, every = (self._locked(full, 0, foreground=foreground, **more) for foreground in (None, False))
            self._close(fewer, every, f"{what} changed the edit", advice)

    def _arguments(self, clip: int | None = None) -> dict[str, Any]:
        return self.extra_args if clip is None else take(self.extra_args, torch.tensor([clip]), len(self.x))

    def _bare(self, x: Tensor, clip: int | None = None) -> Tensor:
        return self.model(x, self.sigma[: len(x)], **self._arguments(clip))

    def _lock(self, policy: Policy, rows: slice = slice(None), **options: Any) -> KVLock:
        given = {"source": self.source[rows], "noise": self.noise[rows], "mask": self.mask[rows], "layers": self.layers}
        return KVLock(self.model, policy=policy, **{**given, "composite": False, **options})

    def _locked(self, policy: Policy, clip: int | None = None, **options: Any) -> Tensor:
        rows = slice(None) if clip is None else slice(clip, clip + 1)
        more = {name: options.pop(name) for name in ("uncond", "cond_scale") if name in options}
        with self._lock(policy, rows, **options) as locked:
            return locked(self.x[rows], self.sigma[rows], **self._arguments(clip), **more)

    def _spy(self, mode: Any, x: Tensor, source: dict[str, KeyValue] | None = None) -> _Spy:
        ratio = FittedMask(self.mask).background(x, self.layers.patch).expand(len(x), -1)
        spy = _Spy(mode, ratio, token_grid(x.shape, self.layers.patch), source=source or {})
        Hooks(self.layers).run(spy, lambda: self._bare(x), may_skip=True)
        return spy

    def _apart(self, a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).abs().max() / self.plain.double().std().clamp(min=1e-12))

    def _close(self, a: Tensor, b: Tensor, what: str, advice: str) -> None:
        if not (apart := self._apart(a, b)) <= self.tolerance:  # NaN too
            raise AttentionError(
                f"{what}: by {apart:.2g} standard deviations in {self.x.dtype}; expected rounding, "
                f"{self.tolerance:.2g} at most.\n  {advice}"
            )

    def _same(self, out: Tensor, what: str, advice: str) -> None:
        if not torch.equal(out, self.plain):
            raise AttentionError(
                f"{what} gave another answer than the bare model, by {self._apart(out, self.plain):.2g} standard "
                f"deviations; expected the same bit for bit.\n  {advice}"
            )


def _each(locks: list[float]) -> Policy:
    """A fixed lock for each clip. Unlike Constant(0), it never promises not to lock."""
    return stateless(lambda obs: Control(torch.tensor(locks)), uses_risk=False)


def _check_hits(seen: Seen, hits: Sequence[tuple[Grid, int, int | None]], grid: Grid) -> None:
    # A token's own keys move most before anything is mixed, and nearly always thereafter.
    missed = [hit for hit in hits if hit[1] != hit[2]]
    if 2 * len(missed) < len(hits):
        return
    place, wanted, where = missed[0]
    if where is None:
        raise AttentionError(
            f"layer {seen.layer!r}: its keys and values do not change with the video.\n  Leave it out: expected "
            "attention over the video's own tokens, and no cross-attention."
        )
    length = seen.own[0].shape[-2]
    rest = length - seen.ratio.shape[1]
    if seen.start and all(b == a - seen.start for _, a, b in missed):
        hint = f'The video comes first: declare text="last", with_extra(after=...) or sdpa_layers(trailing={rest}).'
    elif rest > seen.start and all(b == a + rest - seen.start for _, a, b in missed):
        hint = f'The video comes last: declare text="first", with_extra(before=...) or sdpa_layers(start={rest}).'
    else:
        hint = "Either patch= is not the network's, or tokens or the rows of its batch are in another order."
    raise AttentionError(
        f"layer {seen.layer!r}: changing the token (time, height, width) = {place} of {grid} moves position {where} of "
        f"{length} most, {len(missed)} times of {len(hits)}; expected {wanted}.\n  {hint}"
    )


def _moved(x: Tensor, places: Sequence[Grid], patch: Grid) -> Tensor:
    changed = x.clone()
    for clip, place in zip(changed, places, strict=True):
        axes = [slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True)]
        part = clip[place[2]] if clip.ndim == 2 else clip[(slice(None), *axes[-(clip.ndim - 1) :])]
        signs = torch.where(torch.arange(part.numel()) % 2 > 0, 1.0, -1.0).view(part.shape)
        part += 4 * part.std().clamp(min=1) * signs.to(part)
    return changed


def _two_masks(x: Tensor, layers: AttentionLayers) -> Tensor:
    """Masks that edit some tokens of every clip, others in the next clip."""
    count = math.prod(token_grid(x.shape, layers.patch))
    if count < 2:
        raise AttentionError(f"x, {tuple(x.shape)}, has {count} token of {layers.patch} latents; expected two or more.")
    edited = torch.zeros(len(x), count).to(x)
    edited[0::2, : count // 2] = 1
    edited[1::2, -max(1, count // 4) :] = 1
    return on_latents(edited, x.shape, layers.patch)


def _module_state(model: Any) -> dict[str, Any]:
    return {
        f"{type(m).__name__} {i}": (type(m), [*m._forward_hooks, *m._forward_pre_hooks], id(vars(m).get("forward")))
        for i, m in enumerate(dict.fromkeys(reachable_modules(model)))
    }


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
