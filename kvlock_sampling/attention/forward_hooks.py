"""Run code around a module's forward: for the length of a `with` block, in one thread or task, compiled or not.

`torch.compile` does not notice forward hooks that are registered later, and does not forget hooks that it has seen. So
a hooked module gets a subclass of its class, whose forward the compiler does not enter. The compiler's guards notice
that, and it compiles a second graph, which breaks at the hook. Both graphs stay cached.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..utils.modules import plain_copies, wearing
from ..utils.threads import compiler_imported, setting

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]  # (call, args, kwargs) -> the output
Before = Callable[[tuple[Any, ...], dict[str, Any]], Arguments]  # (args, kwargs) -> the arguments to call with


class ForwardHook(NamedTuple):
    """Code to run at the calls of a module."""

    module: nn.Module
    around: Around | None = None  # wraps the whole call; nothing inside the module stays compiled
    before: Before | None = None  # changes the arguments only; compiled code inside the module stays compiled


def _hooked(kind: Any) -> Any:
    """The subclass of a module's class whose forward runs hooks. It is made once, as compiled graphs hold on to it."""
    name = f"_kvlock_hooked_{compiler_imported():d}"
    if hasattr(kind, "_kvlock_hooked") or name in vars(kind):
        return vars(kind).get(name, kind)
    # torch.compiler.disable imports the compiler, which takes seconds.
    hide: Any = torch.compiler.disable if compiler_imported() else lambda function, recursive=True: function
    wrapped = hide(lambda around, call, *args, **kwargs: around(call, args, kwargs))

    @hide
    def prepared(module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        for hook in _hooks.get().get(id(module), ()):
            if hook.before is not None:
                args, kwargs = hook.before(args, kwargs)
            if hook.around is not None:
                call = partial(wrapped, hook.around, call)
        return call, args, kwargs

    def run(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, args, kwargs = prepared(module, own, args, kwargs)
        with setting(_hooks, {**_hooks.get(), id(module): ()}):  # other code may have put this forward within another
            return call(*args, **kwargs)

    @hide
    def forward(module: nn.Module) -> Callable[..., Any]:
        # A forward that other code, such as offloading, has set on the instance runs inside.
        return partial(hidden, module, vars(module).get("forward") or MethodType(kind.forward, module))

    def put(module: nn.Module, own: Any) -> None:  # perhaps what was read above, put back
        vars(module)["forward"] = own.args[1] if getattr(own, "func", None) is hidden else own

    hidden = hide(run, recursive=False)
    either = property(forward, put, lambda module: vars(module).pop("forward", None))
    setattr(kind, name, plain_copies(kind, {"forward": either, "_kvlock_hooked": True}))
    return vars(kind)[name]


_hooks: ContextVar[dict[int, tuple[ForwardHook, ...]]] = ContextVar("kvlock_forward_hooks", default={})  # noqa: B039


@contextmanager
def hooked(hooks: Iterable[ForwardHook]) -> Iterator[None]:
    """Run these hooks for calls made inside the block, by this thread or task. Nested blocks add up."""
    now = dict(_hooks.get())
    with ExitStack() as stack:
        for hook in hooks:
            now[id(hook.module)] = (*now.get(id(hook.module), ()), hook)
            stack.enter_context(wearing(hook.module, _hooked))
        stack.enter_context(setting(_hooks, now))
        yield


def patched(module: nn.Module) -> bool:
    """Whether a call of the module runs a function of a user's instead of its class's forward."""
    own = vars(module)
    forward, references = own.get("forward"), getattr(own.get("_diffusers_hook"), "_fn_refs", None)
    for _ in range(4):  # accelerate's and diffusers' wrappers are peeled off; what they put back is the class's own
        maker = getattr(getattr(forward, "func", None), "__module__", "")
        if maker == "accelerate.hooks":
            forward = own.get("_old_forward")
        elif maker == "diffusers.hooks.hooks" and references:
            forward = references[0].original_forward or references[0].forward
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
