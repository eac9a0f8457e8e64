"""Every promise that `check_layers` tests, at one noise level and in one precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _len_torch_function_stack

from ..attention import AttentionLayers, FusionContext, Hooks
from ..attention.context import KeyValue
from ..batching import take
from ..lock import KVLock
from ..masks.fitted import FittedMask
from ..policy import Constant, Policy
from ..source import Source
from ..types import AttentionError, Control, Denoiser, Observation
from ..utils.signature import method_of, parameters_of
from ._parts import Hit, Seen, check_hits, coarsest, hit, module_state, moved, some, two_masks

_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest deviation that counts as rounding, in standard deviations of the output."""


@dataclass(frozen=True)
class _Each(Policy):
    """A fixed lock for each clip; unlike Constant(0) it never promises not to lock."""

    locks: tuple[float, ...]

    uses_risk = False

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        return state, Control(torch.tensor(self.locks))


@dataclass(frozen=True)
class _Spy(FusionContext):
    """A context that also remembers every attention call, to look at keys and values from inside."""

    seen: list[Seen] = field(default_factory=list)

    def process(self, layer: str, key: Tensor, value: Tensor, start: int, ratio: Tensor) -> KeyValue:
        used = super().process(layer, key, value, start, ratio)
        if len(ratio) == self.batch:  # else `process_row` remembers it
            chunks = len(key) // self.batch
            clips = list(range(self.batch)) * chunks
            own = key.clone(), value.clone()
            self.seen.append(Seen(layer, clips, start, ratio.repeat(chunks, 1), own, used))
        return used

    def process_row(self, layer: str, index: int, key: Tensor, value: Tensor, start: int) -> KeyValue:
        used = super().process_row(layer, index, key, value, start)
        clip = index % self.batch
        own = key.clone(), value.clone()
        self.seen.append(Seen(f"{layer}[{index}]", [clip], start, self.ratio[clip : clip + 1], own, used))
        return used


def _turns(seen: Sequence[Seen]) -> Iterator[tuple[Seen, int]]:
    """Each with how often its layer had acted before."""
    times: Counter[str] = Counter()
    for one in seen:
        yield one, times[one.layer]
        times[one.layer] += 1


class Promises:
    """Of one denoiser and its layers, for latents like x; `keep` raises AttentionError where one is not kept."""

    def __init__(
        self,
        model: Denoiser,
        layers: AttentionLayers,
        x: Tensor,
        extra_args: dict[str, Any],
        level: float,
        expected: int | None,
        tolerance: float | None,
        seed: int,
    ) -> None:
        self.model, self.layers, self.extra_args, self.level, self.expected = model, layers, extra_args, level, expected
        self.sigma = torch.full((len(x),), level, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        generator = torch.Generator().manual_seed(seed)
        self.source, self.noise, other, noise = (
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for _ in range(4)
        )
        self.x = self._noised(other, noise)
        self.z = self._noised(self.source, self.noise)
        self.mask = two_masks(x, coarsest(layers))
        self.tolerance = tolerance or _ROUNDING.get(x.dtype, 1e-3)
        self.fired: set[str] = set()

    def keep(self, *, all_of_them: bool = True) -> set[str]:
        """The names of the layers that fired. Not `all_of_them`: only those that depend on precision."""
        with self._untouched():
            self.plain = self._bare(self.x)
            self._same(self._bare(self.x), self.plain, "the same call", "model.eval() turns dropout off.")
            self._clips_apart()
            self._places()
            self._off()
            self._keys_and_values()
            self._self_consistent()
            if all_of_them:
                self._ways_agree()
                self._clips_locked_apart()
                self._left_out()
        return self.fired

    # -- promises -----------------------------------------------------------------------------------------------------

    def _clips_apart(self) -> None:
        for clip in range(len(self.x)):
            alone = self._bare(self.x[clip : clip + 1], clip)
            self._close(
                alone,
                self.plain[clip : clip + 1],
                f"the bare model gives clip {clip} alone another answer than in a batch, without any lock",
                "Tensors of extra_args that belong to clips need the batch as their first axis.",
            )

    def _places(self) -> None:
        """One token of every clip is changed; its own keys and values must be those that change most."""
        grid = self.layers.grid(self.x.shape)
        own = self._spy("capture", self.x).seen
        t, h, w = (size - 1 for size in grid)
        hits: dict[str, list[Hit]] = {}
        for corners in ([(0, h, 0), (t, 0, w)], [(t, 0, w), (0, h, 0)], [(t // 2, h // 2, w), (0, 0, 0)]):
            places = [corners[clip % 2] for clip in range(len(self.x))]
            changed = self._spy("capture", moved(self.x, places, self.layers.patch)).seen
            for before, after in zip(own, changed, strict=True):
                for row, clip in enumerate(before.clips):
                    found = hit(before, after, row, places[clip], grid, self._factor(before.layer))
                    hits.setdefault(before.layer, []).append(found)
        for of_one_site in hits.values():
            check_hits(of_one_site, grid)

    def _keys_and_values(self) -> None:
        source = self._spy("capture", self.z)
        edit = self._spy("inject", self.x, source)
        # A layer may act several times: in a network that is called twice, or a layer that is used twice.
        theirs = {
            (seen.layer, turn, clip): (seen, row)
            for seen, turn in _turns(source.seen)
            for row, clip in enumerate(seen.clips)
        }
        for seen, turn in _turns(edit.seen):
            for row, clip in enumerate(seen.clips):
                kept = torch.zeros(seen.own[0].shape[-2], dtype=torch.bool, device=seen.ratio.device)
                kept[seen.start : seen.start + seen.ratio.shape[1]] = seen.ratio[row] > 0
                from_source = theirs.get((seen.layer, turn, clip))
                for which, own, used in zip(("keys", "values"), seen.own, seen.used, strict=True):
                    self._equal(used[row][..., ~kept, :], own[row][..., ~kept, :], seen.layer, which, "edited or text")
                    if from_source is not None:
                        other = from_source[0].own[which == "values"][from_source[1]]
                        self._equal(used[row][..., kept, :], other[..., kept, :], seen.layer, which, "background")
        self.fired |= edit.record.fired
        count = len(edit.record.fired)
        if edit.record.fired != source.record.fired or (self.expected is not None and count != self.expected):
            raise AttentionError(
                f"{count} layers were fused in one evaluation at sigma={self.level}, {len(source.record.fired)} ran for "
                f"the source; expected {len(source.record.fired) if self.expected is None else self.expected}.\n"
                f"  Fused: {some(sorted(edit.record.fired))}."
            )

    def _off(self) -> None:
        advice = "A hook changes the model where it should do nothing: is the forward of a layer called twice?"
        with self._lock(_Each((0.0,) * len(self.x))) as off:
            self._same(off(self.x, self.sigma, **self.extra_args), self.plain, "lock 0", advice)
        with self._lock(Constant(lock=1.0)) as full:
            full(self.x, self.sigma, **self.extra_args)
            self._same(self._bare(self.x), self.plain, "the bare model inside the block", advice)
        self._same(self._bare(self.x), self.plain, "the bare model after the block", advice)

    def _self_consistent(self) -> None:
        # One prompt for both branches, where the model guides itself: what the source's are locked to is one of them.
        arguments = {**self.extra_args, "uncond": self.extra_args["cond"]} if self._guides else self.extra_args
        plain, rounding = self.model(self.z, self.sigma, **arguments), 0.0
        for lock in (0.5, 1.0):
            with self._lock(Constant(lock=lock)) as locked:
                out = locked(self.z, self.sigma, **arguments)
            rounding = max(rounding, self._apart(out, plain))
            self._close(
                out,
                plain,
                f"locked by {lock} to the clip it is itself, at the same noise, the output changed",
                "The source's keys and values went to other tokens or rows than they came from, or differ from call to "
                "call: noise inside the model, or a mask that was made for another batch.",
            )
        change = self._apart(self._locked(1.0), self.plain)
        if not change > max(1e-4, 3 * rounding):
            raise AttentionError(
                f"lock 1 to another clip changed the output by {change:.2g} standard deviations; expected more than "
                f"rounding, {rounding:.2g} here.\n  Attention has no say in this network: weights of 0, as fresh "
                "networks have them? Or the layers are of a copy that does not answer."
            )

    def _ways_agree(self) -> None:
        advice = "Rows must come as chunks of whole batches, [uncond, cond, source], and leave in the same order."
        if not self._guides:  # a model that does is given the source in a pass of its own anyhow
            one, two = self._locked(0.6), self._locked(0.6, batched=False)
            what = "the source as rows of the same call, and in a pass of its own, gave two answers"
            self._close(one, two, what, advice)
        if "cond" in self.extra_args and not self._guides and "uncond" not in parameters_of(self.model):
            order = torch.arange(len(self.x)).flip(0)
            more = {"uncond": take(self.extra_args["cond"], order, len(self.x)), "cond_scale": 2.0}
            one, two = self._locked(0.6, **more), self._locked(0.6, batched=False, **more)
            self._close(one, two, "guidance in one call, and in one after another, gave two answers", advice)

    def _clips_locked_apart(self) -> None:
        locks = tuple(1.0 - 0.6 * (clip % 2) for clip in range(len(self.x)))
        with self._lock(_Each(locks)) as lock:
            together = lock(self.x, self.sigma, **self.extra_args)
        for clip, ratio in enumerate(locks):
            with self._lock(Constant(lock=ratio), clip) as lock:
                alone = lock(self.x[clip : clip + 1], self.sigma[clip : clip + 1], **self._arguments(clip))
            self._close(
                alone,
                together[clip : clip + 1],
                f"clip {clip} alone came out otherwise than in a batch of {len(locks)} with other masks and locks",
                "The model mixes its clips, or puts its rows in another order: it must keep chunks of whole batches.",
            )

    def _left_out(self) -> None:
        if not self.layers.narrows:
            return
        if len(self.fired) < len(self.layers.layers) // max(1, len(self.layers.networks)):
            return  # a lock refuses to leave tokens out there; check_layers names the layers that never ran
        advice = "The architecture's flow= is not right: name every argument of a block that has one entry per token."
        every = self._locked(1.0, composite=True, foreground=False)
        try:
            fewer = self._locked(1.0, composite=True)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise AttentionError(
                f"leaving fully locked tokens out of the computation fails: {str(error).splitlines()[0]}\n  {advice}"
            ) from error
        what = "leaving fully locked tokens out of the computation changed the edit"
        self._close(fewer, every, what, advice)
        if "cond" in self.extra_args and not self._guides and "uncond" not in parameters_of(self.model):
            # One clip, guided: three rows, which nothing else must be taken for.
            more, found = {"uncond": self._arguments(0)["cond"], "cond_scale": 2.0}, []
            for foreground in (None, False):
                with self._lock(Constant(lock=1.0), 0, composite=True, foreground=foreground) as lock:
                    found.append(lock(self.x[:1], self.sigma[:1], **self._arguments(0), **more))
            self._close(found[0], found[1], what, advice)

    # -- means --------------------------------------------------------------------------------------------------------

    @property
    def _guides(self) -> bool:
        """Whether the model does its own guidance."""
        return "cond" in self.extra_args and "uncond" in self.extra_args

    def _noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        return Source(clean, add_noise=method_of(self.model, "add_noise")).at(clean, self.level, noise)

    def _arguments(self, clip: int | None = None) -> dict[str, Any]:
        """The extra arguments, of all clips or of one."""
        return self.extra_args if clip is None else take(self.extra_args, torch.tensor([clip]), len(self.x))

    def _bare(self, x: Tensor, clip: int | None = None) -> Tensor:
        return self.model(x, self.sigma[: len(x)], **self._arguments(clip))

    @contextmanager
    def _lock(self, policy: Policy, clip: int | None = None, **options: Any) -> Iterator[KVLock]:
        rows = slice(None) if clip is None else slice(clip, clip + 1)
        given = {"source": self.source[rows], "noise": self.noise[rows], "mask": self.mask[rows], "layers": self.layers}
        with KVLock(self.model, policy=policy, **{**given, "composite": False, **options}) as lock:
            yield lock

    def _locked(self, lock: float, **options: Any) -> Tensor:
        more = {name: options.pop(name) for name in ("uncond", "cond_scale") if name in options}
        with self._lock(Constant(lock=lock), **options) as locked:
            return locked(self.x, self.sigma, **self.extra_args, **more)

    def _spy(self, mode: Any, x: Tensor, kept: _Spy | None = None) -> _Spy:
        ratio = FittedMask(self.mask).background(x, self.layers.patch).expand(len(x), -1)
        source = {} if kept is None else kept.record.captured
        spy = _Spy(mode, ratio, self.layers.grid(x.shape), source=source)
        Hooks(self.layers).run(spy, lambda: self._bare(x), may_skip=True)
        return spy

    def _factor(self, layer: str) -> tuple[int, int, int]:
        """How much larger this layer's tokens are than the network's."""
        larger = next(
            (s.patch for s in self.layers.layers if s.name == layer and s.patch is not None), self.layers.patch
        )
        t, h, w = (a // b for a, b in zip(larger, self.layers.patch, strict=True))
        return t, h, w

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        before, depth = module_state(self.model), _len_torch_function_stack()
        yield
        changed = [name for name, state in module_state(self.model).items() if state != before.get(name)]
        if changed or _len_torch_function_stack() != depth:
            raise AttentionError(
                f"after the block something stayed behind on {some(changed) or 'the stack of torch functions'}; "
                "expected every hook gone.\n  Was another hook installed inside the block, or does the model make one?"
            )

    def _apart(self, a: Tensor, b: Tensor) -> float:
        scale = self.plain.double().std().clamp(min=1e-12)
        return float((a.double() - b.double()).abs().max() / scale)

    def _close(self, a: Tensor, b: Tensor, what: str, advice: str) -> None:
        apart = self._apart(a, b)
        if not apart <= self.tolerance:  # NaN too
            raise AttentionError(
                f"{what}: by {apart:.2g} standard deviations in {self.x.dtype}; expected rounding, "
                f"{self.tolerance:.2g} at most.\n  {advice}"
            )

    def _same(self, a: Tensor, b: Tensor, what: str, advice: str) -> None:
        if not torch.equal(a, b):
            raise AttentionError(
                f"{what} gave another answer than the bare model, by {self._apart(a, b):.2g} standard deviations; "
                f"expected the same bit for bit.\n  {advice}"
            )

    def _equal(self, a: Tensor, b: Tensor, layer: str, which: str, tokens: str) -> None:
        if not torch.equal(a, b):
            whose = "the source's" if tokens == "background" else "the edit's own"
            raise AttentionError(f"layer {layer!r}: at lock 1 {which} of {tokens} tokens are not exactly {whose}.")
