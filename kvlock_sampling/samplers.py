"""The samplers of k-diffusion by name:  samplers.dpmpp_2m(model, x, sigmas)  is  k_diffusion.sampling.sample_dpmpp_2m.

`import k_diffusion` executes its training half (clip, cleanfid, wandb, torchvision), which fails on many machines. The
samplers themselves need none of it, so they are loaded on first use as submodules of a private, bare parent package: a
later real `import k_diffusion` is not affected. Where `k_diffusion.sampling` is already imported, that one is used.

Every function is k-diffusion's own, with one addition: a model that has a method `on_schedule` is told the schedule,
`model.on_schedule(sigmas)`, before the first step (not by dpm_fast and dpm_adaptive, which choose their own steps).

Nothing else in this library imports k_diffusion. Source: Crowson, github.com/crowsonkb/k-diffusion.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from .types import Denoiser, SamplerError

Sampler: TypeAlias = Callable[..., Tensor]
NoiseSampler: TypeAlias = Callable[[Any, Any], Tensor]
Seed: TypeAlias = int | Sequence[int]

_PARENT = f"{__package__}._k_diffusion"
_EXTRAS = ("log_likelihood", *(f"get_sigmas_{kind}" for kind in ("karras", "exponential", "polyexponential", "vp")))
_SALT = 0x6B764C6F636B  # any fixed number
_LOCK = threading.RLock()
_MODULES: dict[str, ModuleType] = {}
_SAMPLERS: dict[str, Sampler] = {}

_ABSENT = (
    "k-diffusion is not installed: pip install k-diffusion (Python < 3.13), or pass any callable with the signature "
    "sampler(model, x, sigmas, extra_args=None, callback=None, disable=None) to samplers.run"
)


class _UnknownSamplerError(SamplerError, AttributeError):
    """Also an AttributeError, so that hasattr(samplers, name) answers."""


def names() -> tuple[str, ...]:
    """The names of all samplers, sorted, without k-diffusion's `sample_` prefix. SamplerError without k-diffusion."""
    return tuple(
        sorted(name.removeprefix("sample_") for name in vars(_module("sampling")) if name.startswith("sample_"))
    )


def get(name: str) -> Sampler:
    """The sampler of this name, e.g. get("dpmpp_2m"); the prefix `sample_` is accepted.

    It takes k-diffusion's own arguments: (model, x, sigmas, extra_args=None, callback=None, disable=None, ...), for
    dpm_fast (model, x, sigma_min, sigma_max, n, ...), for dpm_adaptive (model, x, sigma_min, sigma_max, ...); `run`
    hides that difference. Raises SamplerError with the nearest names for an unknown one, or without k-diffusion.
    """
    name = name.removeprefix("sample_")
    with _LOCK:
        if name not in _SAMPLERS:
            if name not in names():
                near = difflib.get_close_matches(name, names(), n=3)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                raise _UnknownSamplerError(f"no sampler is called {name!r}.{hint} There are: {', '.join(names())}")
            _SAMPLERS[name] = _announcing(name, getattr(_module("sampling"), f"sample_{name}"))
        return _SAMPLERS[name]


def is_ranged(sampler: str | Sampler) -> bool:
    """Whether it takes (sigma_min, sigma_max) instead of a schedule, as dpm_fast and dpm_adaptive do."""
    parameters = _parameters(get(sampler) if isinstance(sampler, str) else sampler)
    return "sigmas" not in parameters and {"sigma_min", "sigma_max"} <= parameters.keys()


def run(
    sampler: str | Sampler,
    model: Denoiser,
    x: Float[Tensor, "batch ..."],
    sigmas: Tensor,
    *,
    seed: Seed | None = None,
    disable: bool | None = True,
    **kwargs: Any,
) -> Float[Tensor, "batch ..."]:
    """Run any sampler in one uniform call and return its final x.

    sampler: a name, or any callable sampler(model, x, sigmas, extra_args=None, callback=None, disable=None).
    x: start, noise of scale sigmas[0] (plus the clip, when starting part-way). sigmas: (levels,), finite, >= 0.
    seed: makes ancestral and SDE samplers reproducible without touching torch's global state: one int, or one per clip.
        Deterministic samplers have nothing to seed. An explicit `noise_sampler` wins.
    disable: no progress bar by default. Everything else (extra_args, callback, eta, ...) is passed on.

    dpm_fast and dpm_adaptive get the first and the last non-zero level, dpm_fast also n = levels - 1 evaluations; they
    end at that last non-zero level, as k-diffusion defines them. Raises SamplerError.
    """
    function = get(sampler) if isinstance(sampler, str) else sampler
    if sigmas.ndim != 1 or len(sigmas) < 2 or not (sigmas.isfinite() & (sigmas >= 0)).all():
        raise SamplerError(
            f"sigmas of shape {tuple(sigmas.shape)} are no schedule: expected (levels,), at least 2, finite and >= 0, "
            "e.g. samplers.flow_sigmas(30, shift=5.0)"
        )
    named = getattr(function, "func", function)  # what a functools.partial is about
    ours, parameters = named in _SAMPLERS.values(), _parameters(function)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {name: p.default for name, p in parameters.items() if p.default is not p.empty} | kwargs
    if seed is not None and given.get("noise_sampler") is None:
        if "noise_sampler" in parameters or anything:
            brownian = "sde" in getattr(named, "__name__", "")
            kwargs["noise_sampler"] = brownian_noise(x, sigmas, seed) if brownian else gaussian_noise(x, seed)
        elif given.get("s_churn") or not ours:
            raise SamplerError("seed= cannot reach this noise: no noise_sampler argument here. Use torch.manual_seed")
    if "disable" in parameters or anything:
        kwargs["disable"] = disable
    if is_ranged(function):
        levels = sigmas[sigmas > 0]
        if len(levels) < 2:
            raise SamplerError(f"{function} needs two non-zero noise levels; sigmas has {len(levels)}")
        if "n" in parameters:
            kwargs.setdefault("n", len(sigmas) - 1)
        return function(model, x, sigma_min=levels[-1].item(), sigma_max=levels[0].item(), **kwargs)
    if not ours:
        _announce(model, sigmas)
    return function(model, x, sigmas, **kwargs)


def gaussian_noise(x: Float[Tensor, "batch ..."], seed: Seed) -> NoiseSampler:
    """A noise sampler (sigma, sigma_next) -> standard normal noise like x, for the ancestral samplers.

    With one seed per clip, a clip's noise does not depend on its neighbours in the batch. It also differs from what
    torch.manual_seed(seed) draws: people start from that, and the first step must not add the same noise again.
    """
    if not isinstance(seed, Sequence):
        generator = torch.Generator(x.device).manual_seed((seed + _SALT) % 2**63)
        return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    rows = [gaussian_noise(row, s) for row, s in zip(x, _per_clip(seed, x), strict=True)]
    return lambda sigma, sigma_next: torch.stack([row(sigma, sigma_next) for row in rows])


def brownian_noise(x: Float[Tensor, "batch ..."], sigmas: Float[Tensor, " levels"], seed: Seed) -> NoiseSampler:
    """k-diffusion's Brownian tree over these noise levels, for the SDE samplers: the same path at any step count.

    The tree spans 1% more than the schedule, in float64: SDE samplers ask for exp(log(sigma)), which rounds to just
    outside of it, and torchsde warns. The noise is standard normal whatever the span.
    """
    levels = sigmas[sigmas > 0].double().cpu()
    seeds = _per_clip(seed, x) if isinstance(seed, Sequence) else seed
    return _module("sampling").BrownianTreeNoiseSampler(x, levels.min() / 1.01, levels.max() * 1.01, seed=seeds)


def flow_sigmas(
    n: int,
    *,
    shift: float = 1.0,
    t_max: float = 0.999,
    t_min: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " levels"]:
    """A rectified-flow schedule in variance-exploding form: (n + 1,) noise levels, falling, the last exactly 0.

    Uniform in u, then  t = shift * u / (1 + (shift - 1) * u)  and  sigma = t / (1 - t).  `shift` > 1 spends more steps
    at high noise (Wan: 3 at 480p, 5 at 720p). t = 1, where flow models start, is sigma = infinity, so the shifted time
    starts at `t_max`: sigma = 999 by default, whatever the shift; the model is then asked at t = 0.999, and 0.1% of the
    clean signal that x should hold is missing, far below the model's own error. `t_min` is the last non-zero time, also
    after the shift; by default the grid runs evenly down to 0. Raises SamplerError unless 0 < t_min < t_max < 1.

    >>> flow_sigmas(4, t_max=0.8)
    tensor([4.0000, 1.5000, 0.6667, 0.2500, 0.0000])
    """
    if n < 1 or not shift > 0:
        raise SamplerError(
            f"flow_sigmas(n={n}, shift={shift}): expected n >= 1 steps and shift > 0, e.g. n=30, shift=5.0"
        )
    if not 0 < (t_min or 1e-9) < t_max < 1 or t_min == 0:
        raise SamplerError(
            f"flow_sigmas(t_min={t_min}, t_max={t_max}): expected 0 < t_min < t_max < 1; t = 1 is sigma = infinity and "
            "the final 0 is appended by itself"
        )
    start, stop = (t / (shift - (shift - 1) * t) for t in (t_max, t_min or 0.0))
    u = torch.linspace(start, stop, n if t_min else n + 1, dtype=torch.float64)
    u = torch.cat([u, u.new_zeros(1)]) if t_min else u
    t = shift * u / (1 + (shift - 1) * u)
    return (t / (1 - t)).to(device, dtype)


def external() -> ModuleType:
    """k-diffusion's own denoiser wrappers (`k_diffusion.external`), loaded like the samplers."""
    return _module("external")


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_module("sampling"), name) if name in _EXTRAS else get(name)


def __dir__() -> list[str]:
    try:
        return sorted({*globals(), *_EXTRAS, *names()})
    except SamplerError:
        return sorted(globals())


def _announcing(name: str, original: Sampler) -> Sampler:
    """The sampler, telling the model its schedule first."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def sampler(*args: Any, **kwargs: Any) -> Tensor:
        try:
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # wrong arguments: the original says so better
            given = {}
        _announce(given.get("model"), given.get("sigmas"))
        return original(*args, **kwargs)

    sampler.__module__, sampler.__qualname__ = __name__, name  # found again by pickle
    return sampler


def _announce(model: Any, sigmas: Tensor | None) -> None:
    on_schedule = getattr(model, "on_schedule", None)
    if sigmas is not None and callable(on_schedule):
        on_schedule(sigmas)


def _module(stem: str) -> ModuleType:
    """k_diffusion.<stem>: the user's where it is imported already, otherwise under our private parent."""
    with _LOCK:
        if stem not in _MODULES:
            _MODULES[stem] = sys.modules.get(f"k_diffusion.{stem}") or _load(stem)
        return _MODULES[stem]


def _load(stem: str) -> ModuleType:
    try:
        if _PARENT not in sys.modules:
            sys.modules[_PARENT] = _bare_parent()
        with _torchvision_stand_in():
            importlib.import_module(f"{_PARENT}.utils")
        return importlib.import_module(f"{_PARENT}.{stem}")
    except BaseException as error:
        for name in [name for name in sys.modules if name == _PARENT or name.startswith(f"{_PARENT}.")]:
            del sys.modules[name]
        if isinstance(error, ModuleNotFoundError):
            raise SamplerError(f"k-diffusion's {stem}.py needs {error.name}: pip install {error.name}") from error
        raise


def _bare_parent() -> ModuleType:
    try:
        found = importlib.util.find_spec("k_diffusion")  # looks for the package, does not execute it
    except ValueError:  # a stand-in without a spec in sys.modules
        found = None
    if found is None or found.submodule_search_locations is None:
        raise SamplerError(_ABSENT)
    spec = ModuleSpec(_PARENT, None, is_package=True)
    spec.submodule_search_locations = list(found.submodule_search_locations)
    return importlib.util.module_from_spec(spec)


@contextlib.contextmanager
def _torchvision_stand_in() -> Iterator[None]:
    """k-diffusion's utils.py imports torchvision only to convert PIL images, and on some machines it is broken."""
    name = "torchvision.transforms"
    if sys.modules.get("torchvision") or name in sys.modules:
        yield
        return
    stand_in = ModuleType(name)
    stand_in.functional = ModuleType(f"{name}.functional")  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def _parameters(function: Sampler) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a callable without a readable signature
        return {}


def _per_clip(seed: Sequence[int], x: Tensor) -> list[int]:
    if len(seed) != len(x):
        raise SamplerError(f"{len(seed)} seeds for a batch of {len(x)}: pass one int, or one seed per clip")
    return list(seed)
