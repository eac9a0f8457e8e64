"""A guider of ComfyUI as a denoiser `D(x, sigma, cfg=..., cond=..., uncond=...)` in the model's own noise levels.

ComfyUI batches conditions, splits them by memory, cuts windows out of long clips and applies the patches of other
packs. All of that runs unchanged: the source's rows join each call of the network, and leave its result.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...attention.context import acting
from ...types import AttentionError, RunError
from ...utils.threads import setting

Predictions = tuple[Tensor | None, Tensor | None, Tensor | None]
Beside = tuple[Tensor, Mapping[str, Any]]
T = TypeVar("T", float, Tensor)

HIGHEST = 1e4
"""Noise level on the policies' clock of a flow model's first step, t = 1, where the source has no share in x."""
_POSITIONAL = ("c_concat", "c_crossattn", "control", "transformer_options")


class GuiderDenoiser:
    """What a lock wraps in ComfyUI.

    Args:
        guider: ComfyUI's guider within its run: its model is loaded and its conditions are processed.
        conds: The guider's processed conditions by the names that `cond` and `uncond` may have.

    Attributes:
        model: The network, in which the attention layers are found.
        predictions: (cond, uncond, source) of the last call; None where unknown.
    """

    def __init__(self, guider: Any, conds: Mapping[str, Any]) -> None:
        self._guider, self.conds = guider, conds
        self.model = guider.inner_model.diffusion_model
        self.kvlock_host = self
        self.predictions: Predictions = (None, None, None)
        self._predict: Callable[..., Tensor] = guider.predict_noise
        self._options: Mapping[str, Any] = {}
        self._seed: int | None = None

    def within(self, predict: Callable[..., Tensor], options: Mapping[str, Any], seed: int | None) -> None:
        """Take the guider's prediction, model options and seed of the evaluation that begins."""
        self._predict, self._options, self._seed = predict, options, seed

    @property
    def guides_itself(self) -> bool:
        """Whether the guider combines predictions by a rule of its own."""
        from comfy.samplers import CFGGuider

        return type(self._guider).predict_noise is not CFGGuider.predict_noise

    @property
    def sampling(self) -> Any:
        return self._guider.inner_model.model_sampling

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return the clip at a noise level, by the model's own rule."""
        return self.sampling.noise_scaling(sigma, noise, x0).to(x0.dtype)

    def to_ve(self, sigma: T) -> T:
        """Return the noise level in variance-exploding form: t / (1 - t) for flow models, at most `HIGHEST`."""
        from comfy.model_sampling import CONST

        if not isinstance(self.sampling, CONST):
            return sigma
        if isinstance(sigma, Tensor):
            return (sigma / (1 - sigma).clamp_min(1e-9)).clamp_max(HIGHEST)
        return min(sigma / max(1 - sigma, 1e-9), HIGHEST)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """Return the guider's prediction.

        Args:
            x: The sampler's input.
            sigma: The noise level in the model's own form, (batch,).
            extra_args: `cfg`, a scale or one per clip; `beside`, the source's (x, arguments): its rows then join those
                of the edit in every call of the network.
        """
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

        guider, options = self._guider, _cloned(self._options)
        # Without a negative prompt there is nothing to guide from.
        cfg = extra_args["cfg"] if "negative" in self.conds else guider.cfg
        beside = extra_args.get("beside")
        taken = _Source(self, beside, sigma) if beside is not None else None
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, "kvlock", _applied(taken), options, is_model_options=True)
        if taken is not None:
            add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "kvlock", _split, options, is_model_options=True)
        seen: list[tuple[Tensor, Tensor]] = []
        per_clip = isinstance(cfg, Tensor)
        if per_clip and any("cfg_function" in name for name in options):
            raise RunError(
                "another node guides by a rule of its own, with one scale for all clips, and the policy has one for "
                "each; expected one clip at a time, a policy without a guidance range, or no such node."
            )

        def see(given: dict[str, Any]) -> Tensor:
            cond, uncond = given["cond_denoised"], given["uncond_denoised"]
            if given["cond"] is self.conds.get("positive"):  # not of a guider's second prompt
                seen.append((cond, uncond))
            return uncond + (cond - uncond) * cfg if per_clip else given["denoised"]

        options["sampler_post_cfg_function"] = [see, *options.get("sampler_post_cfg_function", [])]
        before = guider.cfg
        # A scale per clip acts in `see`; any other than 1 makes ComfyUI evaluate the negative prompt.
        guider.cfg = 2.0 if per_clip else cfg
        try:
            out = self._predict(x, sigma, options, self._seed)
        finally:
            guider.cfg = before
        positive, negative = seen[0] if len(seen) == 1 else (None, None)
        guided = per_clip or cfg != 1.0 or bool(options.get("disable_cfg1_optimization"))
        source = None if taken is None else taken.prediction()
        self.predictions = positive, negative if guided else None, source
        return out

    def branch(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """Return the prediction of the condition that `cond` names, alone."""
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
        from comfy.samplers import calc_cond_batch

        throw_exception_if_processing_interrupted()
        options = _cloned(self._options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, "kvlock", _applied(None), options, is_model_options=True)
        conds = [cond for cond, _ in self.active(extra_args["cond"], x, sigma)]
        return calc_cond_batch(self._guider.inner_model, [conds], x, sigma, options)[0]

    def joins(self, x: Tensor, sigma: Tensor, arguments: Mapping[str, Any]) -> bool:
        """Whether the source's arguments have the shapes of all prompts', so that it can be a row of any call."""
        names = {"positive", *self.conds}
        if self._guider.cfg == 1 and not (self.guides_itself or self._options.get("disable_cfg1_optimization")):
            names -= {"negative"}
        given = [_tensors(part) for name in names for _, part in self.active(name, x, sigma)]
        theirs = {key: value.shape[1:] for key, value in self.arguments(arguments["cond"], x, sigma).items()}
        same = all({key: value.shape[1:] for key, value in each.items()} == theirs for each in given)
        if not same and self._options.get("context_handler") is not None:
            raise AttentionError(
                "the prompt, the negative prompt and the source prompt have different lengths, which context windows "
                "cannot take; expected the same.\n  Encode all with the same text encoder, to one length."
            )
        return same

    def arguments(self, name: str, x: Tensor, sigma: Tensor) -> dict[str, Any]:
        """The network's arguments under a condition, as tensors with one row per clip."""
        return _tensors(self.active(name, x, sigma)[0][1])

    def active(self, name: str, x: Tensor, sigma: Tensor) -> list[tuple[Any, Any]]:
        """The conditions under a name that hold at this noise level, and what ComfyUI makes of each; where none holds,
        those of the positive prompt.
        """
        from comfy.samplers import get_area_and_mult

        for key in (name, "positive", *self.conds):
            parts = [(cond, get_area_and_mult(cond, x, sigma)) for cond in self.conds.get(key, ())]
            if holding := [(cond, part) for cond, part in parts if part is not None]:
                return holding
        raise AttentionError(
            "no condition holds at this noise level, so there is nothing to evaluate the source under."
        )


def _tensors(part: Any) -> dict[str, Tensor]:
    return {key: value.cond for key, value in part.conditioning.items() if isinstance(value.cond, Tensor)}


def _applied(taken: "_Source | None") -> Callable[..., Tensor]:
    """A wrapper of each call of the network: for the frames of its window, and with the source's rows."""

    def apply_model(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        window = (given.get("transformer_options") or {}).get("context_window")
        with nullcontext() if window is None else _windowed(window):
            if taken is None:
                return executor(x, t, *args, **kwargs)
            return taken.beside(executor, x, t, given, len(args), window)

    return apply_model


class _Source:
    """The source's rows in the network's calls of one evaluation, and what the network predicted for them."""

    def __init__(self, denoiser: GuiderDenoiser, beside: Beside, sigma: Tensor) -> None:
        self.x, arguments = beside
        self.arguments = denoiser.arguments(arguments["cond"], self.x, sigma)
        self._found: list[tuple[Any, Tensor]] = []

    def beside(
        self, executor: Any, x: Tensor, t: Tensor, given: dict[str, Any], positional: int, window: Any
    ) -> Tensor:
        """Call the network with the source as the last rows, and return the others."""
        source = self.x if window is None else window.get_tensor(self.x)
        clips, rows = len(source), len(x)
        if x.shape[1:] != source.shape[1:]:
            raise AttentionError(
                f"a condition for an area gives the network {tuple(x.shape[2:])} of {tuple(source.shape[2:])} latents, "
                "which cannot be locked; expected whole frames. Use Conditioning (Set Mask) in place of Set Area."
            )

        def repeated(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.ndim and len(value) == rows
            return torch.cat([value, value[-clips:]]) if whole else value

        def joined(name: str, value: Any) -> Any:
            theirs = self.arguments.get(name)
            if name == "c_crossattn" and isinstance(theirs, Tensor) and theirs.shape[1:] != value.shape[1:]:
                raise AttentionError(  # the policy guides where the sampler does not
                    f"a prompt has {value.shape[1]} tokens, and the source's {theirs.shape[1]}; expected as many where "
                    "guidance begins within a run. Encode both to one length, or set cfg above 1."
                )
            if isinstance(value, Tensor) and isinstance(theirs, Tensor) and theirs.shape[1:] == value.shape[1:]:
                return torch.cat([value, theirs.to(value).expand(clips, *value.shape[1:])])
            return tree_map(repeated, value)

        options = {**given.get("transformer_options", {})}
        for name in ("cond_or_uncond", "uuids"):  # one entry for each chunk of rows
            if options.get(name):
                options[name] = [*options[name], options[name][-1]]
        arguments = {name: joined(name, value) for name, value in given.items() if name != "transformer_options"}
        if "transformer_options" in given:
            arguments["transformer_options"] = options
        args = [arguments.pop(name) for name in _POSITIONAL[:positional]]
        out = executor(torch.cat([x, source.to(x)]), torch.cat([t, t[-clips:]]), *args, **arguments)
        self._found.append((window, out[-clips:]))
        return out[:-clips]

    def prediction(self) -> Tensor | None:
        """The prediction for the source, the mean where windows overlap; None if a step cache left the network out."""
        if not self._found or self._found[-1][0] is None:
            return self._found[0][1] if self._found else None  # later calls leave layers out, as skipped-layer guidance
        total, count = torch.zeros_like(self.x), torch.zeros_like(self.x)
        for window, part in self._found:
            frames = len(window.index_list)  # an anchor may stand before them
            part = part.narrow(window.dim, part.shape[window.dim] - frames, frames)
            window.add_window(total, part.to(total))
            window.add_window(count, torch.ones_like(part).to(count))
        return total / count


def _cloned(options: Mapping[str, Any]) -> dict[str, Any]:
    from comfy.model_patcher import create_model_options_clone

    return create_model_options_clone(dict(options))


def _split(executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, options: dict[str, Any]) -> Any:
    """Evaluate one condition at a time if both and the source would not fit into memory together."""
    from comfy.model_management import get_free_memory

    used = [i for i, cond in enumerate(conds) if cond is not None]
    free = getattr(model.current_patcher, "get_free_memory", get_free_memory)  # older patchers have none of their own
    rows = [len(x) * (len(used) + 1), *x.shape[1:]]
    if len(used) < 2 or model.memory_required(rows) * 1.5 < free(x.device):
        return executor(model, conds, x, timestep, options)
    out: list[Any] = [None] * len(conds)
    for i in used:
        alone = [cond if i == j else None for j, cond in enumerate(conds)]
        out[i] = executor(model, alone, x, timestep, options)[i]
    return [torch.zeros_like(x) if part is None else part for part in out]


def _windowed(window: Any) -> Any:
    """The acting context, if there is one, for the frames of a window."""
    context = acting.get()
    if context is None or context.grid is None:
        return nullcontext()
    frames, total = context.grid[0], getattr(window, "total_frames", context.grid[0])  # older windows do not say
    if frames != total:
        raise AttentionError(
            f"a context window counts {total} frames, and this network's tokens {frames}; expected one token per "
            "latent frame.\n  Leave the context windows away."
        )
    ratio = window.get_tensor(context.ratio.unflatten(1, context.grid), dim=1)
    return setting(acting, replace(context, ratio=ratio.flatten(1), grid=(ratio.shape[1], *context.grid[1:])))
