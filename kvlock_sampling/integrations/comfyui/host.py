"""A lock around the sampling of a ComfyUI model:  MODEL -> MODEL.

The lock of a run is made when the run begins and freed when it ends, because ComfyUI caches what a node returns and
serves it again for the next prompt. Only what a trace or a second stage reads later is kept, on the host.
"""

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...controller import State
from ...kv_cache import KVCache
from ...lock import KVLock
from ...masks.tokens import on_latents
from ...policy import Constant, Release, ReleaseBelow
from ...policy.wrappers import innermost
from ...trace import Trace
from ...types import MaskError, RunError, SourceError
from .denoiser import GuiderDenoiser
from .inputs import fitted, in_one_line, measured

KEY = "kvlock"
SOURCE = "kvlock_source"  # the source's prompt among a guider's conditions
REFERENCES = {"ref_latent", "ref_latents", "reference_latent", "reference_motion", "time_dim_concat"}
# What a prompt tells a network; some of it only for some prompts.
TEXT = ("c_crossattn", "attention_mask", "y", "txt_byt5", "num_tokens", "guidance", "clip_text_pooled")


class Stage(NamedTuple):
    """What a run left for the next stage: the source's noise, and the last noise level with its state."""

    noise: Tensor
    sigma: float
    state: State


@dataclass(eq=False)
class ComfyLock:
    """Locks every run of the models that it patches.

    Args:
        source: The clip being edited, as ComfyUI's LATENT, a dict with "samples".
        mask: 1 = edit, (frames or 1, height, width). Default: the source's own noise mask, else the run's.
        source_prompt: CONDITIONING of what the clip shows. Default: the run's positive.
        noise: ComfyUI's NOISE for the source's keys and values. Default: the run's own.
        kv_cache: Settings of a `KVCache`, which each run fills anew. Default: the preset's.
        options: Further options of `KVLock`: policy, estimator, threshold, layers, transition, composite, foreground.
        continues: The lock of the stage before; a run goes on with its noise and with what its policy had decided.

    Attributes:
        trace: Of the latest run; None before one.
        released: How much of each latent's background the latest run left to the edit; None if it left nothing.
        stages: How the last few runs ended.
    """

    source: Mapping[str, Any]
    mask: Tensor | None = None
    source_prompt: Any = None
    noise: Any = None
    kv_cache: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    continues: "ComfyLock | None" = None
    trace: Trace | None = field(default=None, init=False)
    released: Tensor | None = field(default=None, init=False)
    stages: deque[Stage] = field(default_factory=lambda: deque(maxlen=16), init=False)

    def patch(self, model: Any) -> Any:
        """Return a clone of a MODEL whose sampling is locked.

        Raises:
            RunError: The model has a lock.
        """
        from comfy.patcher_extension import WrappersMP

        if model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY):
            raise RunError(
                "this model has a KV lock already; expected one: two locks would fuse and composite twice. "
                "Connect the model from before the first lock."
            )
        clone = model.clone()
        if not self.is_off():
            clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _with_memory)
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.sample)
        return clone

    def around(self, sampler: Any) -> Any:
        """Return a SAMPLER that samples any model under the lock."""
        locked = copy.copy(sampler)
        locked.sample = partial(self.sample, sampler.sample)
        return locked

    def is_off(self) -> bool:
        """Whether the policy is that of the preset `off`: then nothing is checked, and ComfyUI samples as it does."""
        policy = self.options.get("policy", "default")
        return policy == "off" or getattr(policy, "policy", policy) == Constant(lock=0.0)

    def next_stage(self) -> "ComfyLock":
        """Return the lock of a second stage, such as Wan 2.2's low-noise network, which continues runs of this one."""
        return replace(self, continues=self)

    def sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One run of a sampler under the lock."""
        if self.is_off() or len(sigmas) < 2:  # no step
            self.trace, self.released = Trace(), None
            return executor(guider, sigmas, extra_args, *args, **kwargs)
        names = ("callback", "noise", "latent_image", "denoise_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        complete = float(sigmas[-1]) == 0  # uni_pc writes into the schedule
        with in_one_line():
            lock = self.lock(guider, sigmas, **given)
            if _acts_on_background(lock):  # else ComfyUI's own noise mask does
                _drop_denoise_mask(lock, given.get("denoise_mask"))
                args = (*args[:3], None, *args[4:])
                kwargs = kwargs | ({"denoise_mask": None} if "denoise_mask" in kwargs else {})
            with lock, self._predicting(lock, guider):
                samples = executor(guider, sigmas, extra_args, *args, **kwargs)
                if not lock.trace:
                    raise RunError(
                        f"{type(guider).__name__} predicts without ComfyUI's own wrappers, so nothing was locked; "
                        "expected CFGGuider, or one that calls it."
                    )
                self._keep(lock)
        return _composited(lock, samples) if complete else samples

    def lock(
        self,
        guider: Any,
        sigmas: Tensor,
        *,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        **_: Any,
    ) -> KVLock:
        """The lock of one run, whose guider has its model loaded.

        Raises:
            SourceError, MaskError: The source or the mask is missing or does not fit; other errors are `KVLock`'s.
        """
        from comfy.sampler_helpers import convert_cond
        from comfy.samplers import process_conds

        model = guider.inner_model
        if len(getattr(model, "latent_shapes", None) or (0,)) > 1 or self.source["samples"].is_nested:
            raise SourceError("the model samples video and sound together; expected a model of video alone.")
        if guider.model_options.get("multigpu_clones"):
            raise RunError(
                "the model runs on several GPUs; expected one: a lock sees one network. Leave the split away."
            )
        clip = self.source["samples"].to(noise)
        if clip.ndim != noise.ndim or clip.shape[1:] != noise.shape[1:]:
            raise SourceError(
                f"the source's latents have the shape {tuple(clip.shape)}, the sampler's {tuple(noise.shape)}; "
                "expected the same. Encode the clip with the model's VAE, and give the sampler the same latent."
            )
        of_run = None if denoise_mask is None else denoise_mask[:, :1]  # ComfyUI repeats it over the channels
        mask = next((m for m in (self.mask, self.source.get("noise_mask"), of_run) if m is not None), None)
        if mask is None:
            raise MaskError(
                "there is no mask; expected one, 1 = edit. Connect it to the lock, or put it on the source's latent "
                "with Set Latent Noise Mask."
            )
        source, options = model.process_latent_in(clip), dict(self.options)
        if self.noise is not None:
            options["noise"] = self.noise.generate_noise({**self.source, "samples": clip.cpu()}).to(noise)
        if self.kv_cache is not None:
            options["kv_cache"] = KVCache(**self.kv_cache)
        conds = dict(guider.conds)
        if self.source_prompt is not None:
            prompt = {SOURCE: convert_cond(self.source_prompt)}
            prompt = process_conds(model, noise, prompt, noise.device, latent_image, denoise_mask)
            conds[SOURCE] = [_with_the_rest(cond, conds["positive"]) for cond in prompt[SOURCE]]
        options["policy"], options["estimator"] = measured(options.get("policy", "default"), options.get("estimator"))
        transformer = guider.model_options.get("transformer_options", {})
        caches = [str(key) for key in transformer if "cache" in str(key) and key != "easycache"]  # of LazyCache too
        if "easycache" in transformer.get("wrappers", {}).get("diffusion_model", {}):
            caches.append("EasyCache")
        if caches:  # TeaCache, MagCache and EasyCache keep something for each prompt
            raise RunError(
                f"a step cache, {', '.join(caches)}, takes the source for a prompt of the edit; expected LazyCache, or "
                "none."
            )
        cached = any("cache" in str(key) for kind in transformer.get("wrappers", {}).values() for key in kind)
        control = any("control" in cond for group in conds.values() for cond in group)
        if any((transformer.get("patches") or {}).values()) or cached or control:  # which count on every token
            options["foreground"] = False
        if guider.model_options.get("context_handler") is not None:
            options |= {"foreground": False, "kv_cache": None}
            options["policy"] = replace(options["policy"], kv_cache=None)
        denoiser, mask = GuiderDenoiser(guider, conds), fitted(mask, source, model.diffusion_model)
        if denoiser.guides_itself or any("cfg_function" in name for name in guider.model_options):
            options["foreground"] = False  # such a rule of guidance may measure whole predictions
        lock = KVLock(
            denoiser,
            source=source.expand_as(noise) if len(mask) > len(source) == 1 else source,
            mask=mask,
            source_args={"cond": SOURCE} if SOURCE in conds else None,
            scale_arg="cfg",
            branch=denoiser.branch,
            sigmas=sigmas,
            **options,
        )
        if self.noise is not None and lock.settings.source is not None:
            lock.settings.source.of_run = None  # it is for keys and values alone: the sampler has its own
        told = {name for group in conds.values() for cond in group for name in cond.get("model_conds", ())}
        if lock.settings.policy.may_lock and (more := told & REFERENCES):
            raise RunError(
                f"reference images ({', '.join(sorted(more))}) are tokens beside the clip's, which cannot be locked; "
                "expected none. Leave them away, or take a policy without a lock."
            )
        if lock.settings.policy.may_lock and lock.settings.layers is None:
            raise MaskError(
                "the mask reaches into every token of the model, so nothing can be locked; expected some left. Draw a "
                "smaller mask, see KV Lock Mask, or take a larger clip."
            )
        return lock

    @contextmanager
    def _predicting(self, lock: KVLock, guider: Any) -> Iterator[None]:
        """Inside the block each evaluation of the guider goes through the lock."""
        from comfy.patcher_extension import WrappersMP

        prompts, denoiser = {"cond": "positive"}, lock.model
        assert isinstance(denoiser, GuiderDenoiser)
        if "negative" in guider.conds and guider.cfg != 1:
            prompts["uncond"] = "negative"

        settings = lock.settings  # what has noise of its own, as `Run` draws it, goes on with it
        continues = settings.layers is not None or (settings.policy.uses_risk and settings.estimator.needs_source)

        def predict(executor: Any, x: Tensor, sigma: Tensor, options: Any = None, seed: Any = None, **more: Any) -> Any:
            if self.continues is not None and continues and not lock.trace:
                self._go_on(lock, self.continues.stages, x, sigma)
            denoiser.within(partial(executor, **more), {} if options is None else options, seed)
            return lock(x, sigma, cfg=guider.cfg, **prompts)

        wrappers = guider.model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        if wrappers.setdefault(WrappersMP.PREDICT_NOISE, {}).get(KEY):
            raise RunError("this run has a KV lock already; expected one, around the model or around the sampler.")
        wrappers[WrappersMP.PREDICT_NOISE][KEY] = [predict]
        try:
            yield
        finally:
            del wrappers[WrappersMP.PREDICT_NOISE][KEY]

    def _go_on(self, lock: KVLock, stages: Sequence[Stage], x: Tensor, sigma: Tensor) -> None:
        """Go on with the stage whose noise explains the background that this run begins with."""
        source, mask, run = lock.settings.source, lock.settings.mask, lock._run()
        stages = [stage for stage in stages if stage.noise.shape in (x.shape, x[:1].shape)]
        if source is None or mask is None or not stages:
            raise SourceError(
                "the stage before has no run to continue; expected one with this clip since ComfyUI started. Run it "
                "again, e.g. with another seed."
            )
        level, background = float(sigma.max()), 1 - mask.latent(x)

        def unexplained(stage: Stage) -> float:
            return float(((source.at(x, level, stage.noise, erased=False) - x) * background).square().sum())

        stage = min(reversed(stages), key=unexplained)  # of runs with one seed the latest
        noise = source.at(x, level, stage.noise, erased=False) - source.at(x, level, stage.noise * 0, erased=False)
        if unexplained(stage) > float((noise * background).square().sum()):
            raise SourceError(
                "no run of the stage before explains the background that this stage begins with; expected its latent, "
                "with leftover noise, of the same clip. Run the stage before again, e.g. with another seed."
            )
        run.noise = stage.noise.to(x)
        # What another network predicted is not comparable, so the estimator begins anew.
        state = stage.state._replace(estimator=lock.settings.estimator.init())
        run.timeline.append(stage.sigma, tree_map_only(Tensor, lambda part: part.to(x.device), state))

    def _keep(self, lock: KVLock) -> None:
        """Keep the trace, and what a next stage needs."""
        run, self.trace, self.released = lock._run(), Trace(), None
        self.trace.steps = [tree_map_only(Tensor, Tensor.cpu, step) for step in lock.trace]
        source = lock.settings.source
        if source is not None and _acts_on_background(lock) and (left := 1 - self.trace.steps[-1].composite).any():
            released = on_latents(left, source.latents.shape, lock.settings.patch)
            self.released = released if released.ndim == 5 else released.unsqueeze(2)
        if run.noise is not None and self.trace.steps and (state := run.timeline.last) is not None:
            left = tree_map_only(Tensor, Tensor.cpu, state._replace(estimator=None))
            self.stages.append(Stage(run.noise.cpu(), self.trace.steps[-1].sigma, left))


def _with_the_rest(cond: Mapping[str, Any], positive: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The source's prompt with what the positive one tells beside text, such as the start image of image to video."""
    if not positive:
        return dict(cond)
    text = {name: value for name, value in cond["model_conds"].items() if name in TEXT}
    rest = {name: value for name, value in positive[0]["model_conds"].items() if name not in TEXT}
    beside = {name: positive[0][name] for name in ("control", "hooks") if name in positive[0]}
    return {**cond, **beside, "model_conds": {**rest, **text}}


def _drop_denoise_mask(lock: KVLock, mask: Tensor | None) -> None:
    """Leave the noise mask of the sampler's latent, 1 = denoise, to the lock. Some networks take it for a map of times
    (Wan 2.2 5B, LTX-Video): the background that ComfyUI composites is clean, while the lock's has the noise of its
    level. Conditions are copies of the run. Raises SourceError for a mask of whole frames, of which it keeps some.
    """
    denoiser: Any = lock.model
    told = [cond["model_conds"] for group in denoiser.conds.values() for cond in group]
    timed = None not in [each.pop("denoise_mask", None) for each in told]
    if mask is None or mask.ndim != 5 or lock.settings.mask is None:
        return
    kept, new = ((mask[:, 0] == value).flatten(2).all(-1) for value in (0, 1))  # frames
    edited = lock.settings.mask.latent(mask)[:, 0].flatten(2).any(-1)
    if kept.any() and new.any() and (kept | new).all() and (timed or (kept & edited).any()):
        raise SourceError(
            "the noise mask of the sampler's latent keeps whole frames, such as a start image, and a lock does not; "
            "expected a mask of the edit. Remove it, or sample without the lock."
        )


def _acts_on_background(lock: KVLock) -> bool:
    policy = lock.settings.policy
    releases = isinstance(innermost(policy), Release | ReleaseBelow)  # also without a lock
    return releases or policy.may_lock or bool(lock.settings.composite or getattr(policy, "composite", None))


def _with_memory(executor: Any, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI plans memory for both prompts; the source needs half as much again."""
    return executor(model, [math.ceil(shape[0] * 1.5), *shape[1:]], *args, **kwargs)


def _composited(lock: KVLock, samples: Tensor) -> Tensor:
    """The result with the source where the last evaluation had it: some samplers end above noise level 0."""
    steps = lock.trace.steps
    return lock.settings.composited(samples, steps[-1].composite) if steps and _acts_on_background(lock) else samples
