"""k-diffusion's samplers by name:  samplers.dpmpp_2m(model, x, sigmas)  is  k_diffusion.sampling.sample_dpmpp_2m.

`import k_diffusion` runs its training half (clip, cleanfid, wandb, torchvision), which fails on many machines, and
samplers need none of it. So its submodules are loaded on first use below a private, bare parent package; a
`k_diffusion.sampling` that is already imported is used. The samplers are k-diffusion's, with one addition: they first
call `model.on_schedule(levels)`, where steps begin, if the model has it; for dpm_fast and dpm_adaptive `run` does.
"""

import functools
import importlib.util
import inspect
import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from .schedules import check_sigmas
from .schedules import flow_sigmas as flow_sigmas
from .types import Denoiser, SamplerError
from .utils.denoiser import method_of, parameters_of
from .utils.fields import check_seed
from .utils.tables import nearest

Sampler: TypeAlias = Callable[..., Tensor]
NoiseSampler: TypeAlias = Callable[[Any, Any], Tensor]
Seed: TypeAlias = int | Sequence[int]

_PARENT = f"{__package__}._k_diffusion"
_EXTRAS = ("log_likelihood", *(f"get_sigmas_{kind}" for kind in ("karras", "exponential", "polyexponential", "vp")))
_SALT = 0x6B764C6F636B
_LOCK = threading.RLock()
_SAMPLERS: dict[str, Sampler] = {}


def names() -> tuple[str, ...]:
    """Return the sorted names of all samplers, without `sample_`. Raises SamplerError if k-diffusion is missing."""
    found = (name for name in vars(_module("sampling")) if name.startswith("sample_"))
    return tuple(sorted(name.removeprefix("sample_") for name in found))


def get(name: str) -> Sampler:
    """Return a sampler with k-diffusion's arguments (model, x, sigmas, extra_args=None, callback=None, ...).

    dpm_fast takes (model, x, sigma_min, sigma_max, n, ...), and dpm_adaptive the same without n.

    Args:
        name: E.g. "dpmpp_2m"; the prefix `sample_` is accepted.

    Raises:
        SamplerError: The name is unknown (the message names the nearest one), or k-diffusion is not installed.
    """
    name = name.removeprefix("sample_")
    with _LOCK:
        if name not in _SAMPLERS:
            if name not in names():
                raise SamplerError(f"no sampler is called {name!r}; {nearest(name, names())}")
            _SAMPLERS[name] = _announcing(name, getattr(_module("sampling"), f"sample_{name}"))
        return _SAMPLERS[name]


def is_ranged(sampler: str | Sampler) -> bool:
    """Whether a sampler takes (sigma_min, sigma_max) instead of a schedule, as dpm_fast and dpm_adaptive do."""
    parameters = parameters_of(get(sampler) if isinstance(sampler, str) else sampler)
    return "sigmas" not in parameters and {"sigma_min", "sigma_max"} <= parameters.keys()


def is_adaptive(sampler: str | Sampler) -> bool:
    """Whether a sampler chooses its steps as it goes, for all rows together, as dpm_adaptive does."""
    return is_ranged(sampler) and "n" not in parameters_of(get(sampler) if isinstance(sampler, str) else sampler)


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
    """Run any sampler through one signature, and return the final x.

    dpm_fast and dpm_adaptive run from the first to the last non-zero level, dpm_fast in one evaluation a step. They
    leave the noise of that level in x; where the schedule ends in 0, one evaluation more predicts the result.

    Args:
        sampler: A name, or a callable sampler(model, x, sigmas, extra_args=None, callback=None, disable=None).
        model: A denoiser, called as `model(x, sigma, **extra_args)`.
        x: The start: noise of scale sigmas[0], plus the clip if it starts part-way.
        sigmas: The schedule (levels,), finite, >= 0, falling.
        seed: Seed of ancestral and SDE samplers, one int or one per clip, unless `noise_sampler` is given.
        disable: Whether to hide the progress bar.
        kwargs: Passed to the sampler: extra_args, callback, eta, ...

    Raises:
        SamplerError: The sampler does not exist, the schedule is invalid, or the seed cannot reach the noise.
    """
    function = get(sampler) if isinstance(sampler, str) else sampler
    if not callable(function):
        raise SamplerError(f"sampler={sampler!r}; expected a name, e.g. 'dpmpp_2m', or a function like k-diffusion's.")
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        raise SamplerError(f"x is {getattr(x, 'dtype', repr(x))}; expected floats: torch.randn(shape) * sigmas[0].")
    sigmas = check_sigmas(sigmas)
    if seed is not None:
        seed = _per_clip(seed, x) if isinstance(seed, Sequence) else check_seed(seed, SamplerError)
    named = getattr(function, "func", function)  # of a functools.partial
    ours, parameters = named in _SAMPLERS.values(), parameters_of(function)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {name: p.default for name, p in parameters.items() if p.default is not p.empty} | kwargs
    if seed is not None and given.get("noise_sampler") is None:
        if "noise_sampler" in parameters or anything:
            brownian = "sde" in getattr(named, "__name__", "")
            kwargs["noise_sampler"] = _brownian_noise(x, sigmas, seed) if brownian else gaussian_noise(x, seed)
        elif given.get("s_churn") or not ours:
            raise SamplerError("seed= cannot reach this noise: no noise_sampler argument here. Use torch.manual_seed")
    if "disable" in parameters or anything:
        kwargs["disable"] = disable
    levels, ranged = sigmas[sigmas > 0], is_ranged(function)
    title = str(getattr(named, "__name__", sampler)).removeprefix("sample_")
    if len(levels) < 2 and (ranged or title in ("dpmpp_2m_sde", "dpmpp_3m_sde")):
        raise SamplerError(f"{title} needs two non-zero noise levels; sigmas has {len(levels)}. One step: 'euler'.")
    if ranged or not ours:
        _announce(model, sigmas)
    if ranged:
        if "n" in parameters:
            kwargs["n"] = given.get("n", len(levels) - 1)
        found: Any = function(model, x, sigma_min=levels[-1].item(), sigma_max=levels[0].item(), **kwargs)
        if sigmas[-1] > 0:
            return found
        x, *info = found if isinstance(found, tuple) else (found,)  # with return_info=True
        with torch.no_grad():
            x = model(x, levels[-1].to(x).expand(len(x)), **(kwargs.get("extra_args") or {}))
        return (x, *info) if info else x  # type: ignore[return-value]
    return function(model, x, sigmas, **kwargs)


def gaussian_noise(x: Float[Tensor, "batch ..."], seed: Seed) -> NoiseSampler:
    """Return a function (sigma, sigma_next) -> standard normal noise like x, for the ancestral samplers.

    Args:
        x: Latents whose shape, dtype and device the noise gets.
        seed: One int, or one per clip; a clip's noise then does not depend on the other clips of the batch.
    """
    # The salt makes the noise differ from torch.manual_seed(seed), from which runs often start.
    if not isinstance(seed, Sequence):
        generator = torch.Generator(x.device).manual_seed(check_seed(seed, SamplerError, plus=_SALT))
        return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    rows = [gaussian_noise(row, s) for row, s in zip(x, _per_clip(seed, x), strict=True)]
    return lambda sigma, sigma_next: torch.stack([row(sigma, sigma_next) for row in rows])


def _brownian_noise(x: Float[Tensor, "batch ..."], sigmas: Float[Tensor, " levels"], seed: Seed) -> NoiseSampler:
    # The tree spans 1% more than the schedule: SDE samplers ask for exp(log(sigma)), which rounds to just outside.
    levels = sigmas[sigmas > 0].cpu().double()
    return _module("sampling").BrownianTreeNoiseSampler(x, levels.min() / 1.01, levels.max() * 1.01, seed=seed)


def external() -> ModuleType:
    """Return k-diffusion's denoiser wrappers, the module `k_diffusion.external`, loaded like the samplers."""
    return _module("external")


def __getattr__(name: str) -> Any:
    if name in _EXTRAS:
        return getattr(_module("sampling"), name)
    if name.startswith("_") or name.removeprefix("sample_") not in names():
        hint = "" if name.startswith("_") else f"; {nearest(name, names())}"
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    return get(name)


def __dir__() -> list[str]:
    try:
        return sorted({*globals(), *_EXTRAS, *names()})
    except SamplerError:
        return sorted(globals())


def _announcing(name: str, original: Sampler) -> Sampler:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def sampler(*args: Any, **kwargs: Any) -> Tensor:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # The original raises a better error.
            return original(*args, **kwargs)
        bound.apply_defaults()
        if not isinstance(sigmas := bound.arguments.get("sigmas"), Tensor | None):
            bound.arguments["sigmas"] = check_sigmas(sigmas).to(bound.arguments["x"].device)
        _announce(bound.arguments["model"], _begun(**bound.arguments))
        return original(*bound.args, **bound.kwargs)

    sampler.__module__, sampler.__qualname__ = __name__, name  # so that pickle finds it
    return sampler


def _begun(*, sigmas: Any = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, **_: Any) -> Any:
    """The levels at which the steps begin: churn adds noise first, as in k-diffusion's samplers; still falling."""
    if not s_churn or not isinstance(sigmas, Tensor):
        return sigmas
    more, begun = 1 + min(s_churn / max(1, len(sigmas) - 1), 2**0.5 - 1), [math.inf]
    for level in sigmas.tolist():
        begun.append(min(level * more if s_tmin <= level <= s_tmax else level, 0.999 * begun[-1]))
    return torch.tensor(begun[1:], dtype=torch.float64)


def _announce(model: Any, sigmas: Tensor | None) -> None:
    if sigmas is not None and (on_schedule := method_of(model, "on_schedule")) is not None:
        on_schedule(sigmas)


def _module(stem: str) -> ModuleType:
    with _LOCK:
        return sys.modules.get(f"k_diffusion.{stem}") or sys.modules.get(f"{_PARENT}.{stem}") or _load(stem)


def _load(stem: str) -> ModuleType:
    try:
        found = importlib.util.find_spec("k_diffusion")  # does not execute the package
    except ValueError:  # sys.modules has a module without a spec
        found = None
    if found is None or found.submodule_search_locations is None:
        raise SamplerError(
            "k-diffusion is not installed: pip install k-diffusion (Python < 3.13), or pass any callable with the "
            "signature sampler(model, x, sigmas, extra_args=None, callback=None, disable=None) to samplers.run"
        )
    if _PARENT not in sys.modules:
        parent, utils = ModuleType(_PARENT), ModuleType(f"{_PARENT}.utils")
        # k-diffusion's utils.py imports torchvision; samplers and denoisers need only this function of it.
        vars(utils)["append_dims"] = lambda x, ndim: x[(..., *[None] * (ndim - x.ndim))]
        vars(parent).update(utils=utils, __path__=list(found.submodule_search_locations))
        sys.modules.update({_PARENT: parent, f"{_PARENT}.utils": utils})
    try:
        return importlib.import_module(f"{_PARENT}.{stem}")
    except ModuleNotFoundError as error:
        raise SamplerError(f"k-diffusion's {stem}.py needs {error.name}: pip install {error.name}") from error


def _per_clip(seed: Sequence[int], x: Tensor) -> list[int]:
    if isinstance(seed, str) or len(seed) != len(x):
        raise SamplerError(f"{len(seed)} seeds for a batch of {len(x)}: pass one int, or one seed per clip")
    return [check_seed(s, SamplerError) for s in seed]


def seeding(sampler: Any, seed: Any) -> dict[str, Any]:
    """{"seed": seed} for `run`; {} for a sampler that is deterministic, or draws from torch's own generator.

    Args:
        sampler: A name, or a function. One that does not name `noise_sampler` is tried with it, on one number.
        seed: As for `run`.
    """
    function = get(sampler) if isinstance(sampler, str) else sampler
    if "noise_sampler" not in parameters_of(function):
        if function in _SAMPLERS.values():
            return {}
        try:
            _tried(function, torch.tensor([2.0, 1.0, 0.0]), noise_sampler=lambda *levels: torch.zeros(1, 1, 1, 1, 1))
        except Exception as error:
            if "noise_sampler" in str(error):
                return {}
    return {"seed": seed}


def evaluated_sigmas(sampler: Any, sigmas: Any) -> list[float]:
    """The noise levels at which a sampler, a name or a function, evaluates a model over a schedule, in order."""
    return _tried(sampler, check_sigmas(sigmas).float().cpu(), **seeding(sampler, 0))


def _tried(sampler: Any, sigmas: Tensor, **given: Any) -> list[float]:
    """The noise levels at which a sampler evaluates, on one number, with ones for all that it reads of `extra_args`."""
    levels: list[float] = []

    def model(x: Tensor, sigma: Any, **extra_args: Any) -> Tensor:
        levels.append(float(torch.as_tensor(sigma).max()))
        return x * 0

    parameters = parameters_of(get(sampler) if isinstance(sampler, str) else sampler)
    if "extra_args" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given["extra_args"] = defaultdict(lambda: torch.ones(1, 1, 1))
    with torch.random.fork_rng(devices=[]):
        run(sampler, model, torch.ones(1, 1, 1, 1, 1), sigmas, **given)
    return levels
