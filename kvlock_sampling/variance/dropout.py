"""Dropout variance: how much the prediction depends on single units of the network.

    var = 1 / (K - 1) * sum_k |D_k(x, sigma) - mean|^2,   D_k the k-th thinned network
averaged over masked elements: Monte Carlo dropout (arXiv 1506.02142). Range >= 0, latent units squared.

In each chosen linear layer a forward hook sets the same random output units to 0 for all rows and tokens, and scales
the others by 1 / (1 - rate): one draw of a network (arXiv 1512.05287), and a clip stays independent of its batch.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..types import EstimatorError, Evaluation
from ..utils.fields import number, reject
from ..utils.precision import working
from ..utils.threads import without_compiler
from .base import Estimator, Patch, ProbingEstimator, generator, pooled

RESIDUAL = (
    r"(^|\.)\d+\.(.*\.)?("
    r"to_out\.0|to_out|to_add_out|out_proj|proj_out|attn_proj|\w+_attn_proj|o|wo|"  # attention
    r"net\.2|ff\w*\.2|mlp\.2|fc2|linear2|w2|down_proj"  # feed-forward
    r")$"
)
"""Names, inside a numbered block, of the linear layers that write into the residual stream."""


@dataclass(frozen=True)
class DropoutVariance(ProbingEstimator):
    """Sample variance between thinned networks at the same point, in latent units squared.

    Args:
        passes: Thinned networks per measurement, >= 2, evaluated one after another. Defaults to 4.
        seed: Seed of the networks. Defaults to 0.
        rate: Fraction of units dropped, in (0, 1). Defaults to 0.1.
        select: A regular expression on names of linear layers. Defaults to the last of attention and feed-forward.
        patch: Latents per token along (time, height, width), to measure every token. Defaults to None, per clip.
        model: The network behind the denoiser. Defaults to None, the one that the lock wraps.

    Raises:
        EstimatorError: No model, or a model without a layer that fits.
    """

    passes: int = 4
    rate: float = 0.1
    select: str | None = None
    patch: Patch | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        number(self, "passes", at_least=2, whole=True)
        super().__post_init__()
        number(self, "rate", above=0.0, below=1.0)
        try:
            re.compile(RESIDUAL if self.select is None else self.select)
        except (re.error, TypeError) as error:
            reject(self, "select", f"a regular expression on layers' names ({error})", r"to_out\.0$")
        if self.model is not None:
            if not isinstance(self.model, nn.Module):
                raise EstimatorError(f"model={self.model!r}; expected a module: DropoutVariance(model=transformer).")
            droppable(self.model, self.select)

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        if self.model is not None:
            return self
        error = EstimatorError("no torch module inside the denoiser. Pass DropoutVariance(model=transformer).")
        for index, module in enumerate(modules):
            try:
                return replace(self, model=module)
            except EstimatorError as found:
                error = error if index else found  # the outermost module has the most names to show
        raise error

    def step(self, state: int, evaluation: Evaluation) -> tuple[int, Tensor | None]:
        if self.model is None:
            raise EstimatorError("no model to drop units of. Give DropoutVariance(model=transformer), or use a KVLock.")
        passes = []
        for k in range(self.passes):
            with dropout_hooks(self.model, self.rate, (self.seed * 1_000_003 + state) * self.passes + k, self.select):
                passes.append(working(evaluation.probe(evaluation.x.detach(), evaluation.sigma)))
        return state + 1, pooled(torch.stack(passes).var(dim=0, correction=1), evaluation.mask, self.patch)


def droppable(model: nn.Module, select: str | None = None) -> dict[str, nn.Linear]:
    pattern = re.compile(RESIDUAL if select is None else select)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not (chosen := {name: m for name, m in linears.items() if pattern.search(name)}):
        shown = ", ".join(list(linears)[:12]) or "none at all"
        raise EstimatorError(
            f"no linear layer of {type(model).__name__} to drop units of fits {select or 'the usual names'!r}.\n  "
            f"Its linear layers: {shown}. Name some by a regular expression: select=r'ffn\\.2$'."
        )
    return chosen


@contextmanager
def dropout_hooks(model: nn.Module, rate: float, seed: int, select: str | None = None) -> Iterator[None]:
    """Thin `model` within the block, in this thread only; the same seed gives the same network."""
    owner = threading.get_ident()

    def thin(keep: Tensor) -> Callable[..., Tensor | None]:  # no partial: locks pass over this package's functions
        return lambda module, args, output: output * keep.to(output) if threading.get_ident() == owner else None

    with ExitStack() as stack, without_compiler():  # which would not notice the hooks
        for index, module in enumerate(droppable(model, select).values()):
            keep = torch.rand(module.out_features, generator=generator(seed, index), device="cpu") >= rate
            stack.callback(module.register_forward_hook(thin(keep / (1 - rate))).remove)
        yield
