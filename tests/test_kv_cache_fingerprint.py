"""Fingerprints: every change of a weight, a setting or an argument shows, and an equal one gives the same."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import warnings
import weakref
from collections import deque
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import lru_cache, update_wrapper
from types import MethodType, ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kvlock_sampling.attention import AttentionLayer, AttentionLayers
from kvlock_sampling.kv_cache import (
    CacheSession,
    KVCache,
    KVCacheError,
    content_fingerprint,
    model_fingerprint,
    uncacheable,
)
from kvlock_sampling.kv_cache import fingerprint as module
from kvlock_sampling.kv_cache.fingerprint import block_sums
from kvlock_sampling.masks.tokens import Selection
from kvlock_sampling.types import AttentionError


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 300), nn.LayerNorm(300), nn.Linear(300, 5))


def fused_optimizer(w):
    optimizer = torch.optim.AdamW([w], lr=0.1, fused=True)
    w.sum().backward()
    optimizer.step()
    w.grad = None


def in_inference_mode(w):
    with torch.inference_mode():
        w.view(-1)[3] += 1


@torch.no_grad()
def in_place(w):
    w[2, 3] += 1


def version_kept(w):
    with torch.autograd._unsafe_preserve_version_counter(w):
        in_place(w)


UNSEEN = {
    "through data": lambda w: w.data[1].mul_(1.5),  # as peft does when it fuses a LoRA
    "through data, all": lambda w: w.data.add_(1),
    "numpy": lambda w: w.detach().numpy().__setitem__((2, 3), 9.0),
    "dlpack": lambda w: torch.from_dlpack(w.detach())[2].zero_(),
    "the storage": lambda w: w.untyped_storage().copy_(torch.ones_like(w).untyped_storage()),
    "a fused optimizer": fused_optimizer,
    "the version kept": version_kept,
}
SEEN = {
    "in place": in_place,
    "inference mode": in_inference_mode,
    "detached": lambda w: w.detach().view(-1)[0].neg_(),
    "other memory": lambda w: setattr(w, "data", w.data + 1),
    "swapped": lambda w: torch.utils.swap_tensors(w, nn.Parameter(torch.ones_like(w))),
}


@pytest.mark.parametrize("way", [*UNSEEN, *SEEN])
def test_every_way_of_writing_to_a_weight_shows(way):
    model = network()
    own, weight = model_fingerprint(model), model[0].weight
    before = weight._version, weight.data_ptr()
    (UNSEEN | SEEN)[way](weight)
    # Why nothing is remembered of a weight: of these writes neither counter nor address tells. Later torches may count.
    if torch.__version__.startswith("2.13."):
        assert ((weight._version, weight.data_ptr()) == before) == (way in UNSEEN)
    assert model_fingerprint(model) != own
    assert model_fingerprint(model) == model_fingerprint(model)


def test_weights_made_in_inference_mode_are_read_as_well():
    with torch.inference_mode():
        model = network()
        own = model_fingerprint(model)
        model[2].weight[4, 4] += 1
        changed = model_fingerprint(model)
    assert own == model_fingerprint(network())
    assert changed != own


DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float64,
    torch.complex64,
    torch.int8,
    torch.bool,
)


@given(st.integers(1, 500), st.integers(0, 7), st.sampled_from(DTYPES), st.data())
@settings(max_examples=80, deadline=None)
def test_one_number_anywhere_in_any_dtype_shows(count, offset, dtype, data):
    at = data.draw(st.integers(0, count - 1))
    generator = torch.Generator().manual_seed(count)
    numbers = (torch.randn(offset + count, generator=generator) * 3).to(dtype)
    sums = block_sums(numbers[offset:])
    assert torch.equal(block_sums(numbers[offset:].clone()), sums)  # at any address
    one = numbers.view(torch.uint8).view(-1, dtype.itemsize)[offset + at, data.draw(st.integers(0, dtype.itemsize - 1))]
    one.bitwise_xor_(1 << data.draw(st.integers(0, 0 if dtype == torch.bool else 7)))
    assert not torch.equal(block_sums(numbers[offset:]), sums)


def test_sums_are_of_blocks_so_that_rows_in_another_order_show(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    sums = block_sums(rows)
    assert not torch.equal(block_sums(rows.flip(0)), sums)
    assert torch.equal(sums[:50], rows.view(torch.int64).sum(-1))
    assert torch.equal(block_sums(rows.t().contiguous().t()), sums)  # the layout does not matter


class Scaled(torch.Tensor):
    """A quantised weight as libraries make them: 8 bits, a scale, and no memory of its own."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values_, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values_", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        raise NotImplementedError(func)

    def dequantize(self):
        return self.values_ * self.scale


def test_the_parts_of_a_quantised_weight_are_read():
    model = nn.Module()
    values = torch.arange(2000).remainder(100).to(torch.int8).view(40, 50)
    model.register_buffer("weight", Scaled(values, torch.tensor(0.5)))
    own = model_fingerprint(model)
    values[0, 1] += 1  # not among those that are sampled
    changed = model_fingerprint(model)
    model.weight.scale.mul_(2)
    doubled = model_fingerprint(model)
    assert len({own, changed, doubled}) == 3
    with torch.inference_mode():  # where `edit_video` samples, and such a tensor cannot be detached
        assert model_fingerprint(model) == doubled
    with torch.no_grad():
        assert model_fingerprint(model) == doubled


class Wrapped(torch.Tensor):
    """A tensor subclass that computes as the tensor within."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)

    def __init__(self, inside):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inside = [arg.inside if isinstance(arg, cls) else arg for arg in args]
        return cls(func(*inside, **(kwargs or {})))

    def numpy(self):
        return self.inside.numpy()


class Packed(torch.Tensor):
    """A quantised weight that keeps its packed bytes itself, as GGUF's does; detaching it leaves its class."""

    def detach(self):
        return super().detach().as_subclass(Packed)


def test_all_bytes_of_a_packed_weight_are_read():
    model, values = nn.Module(), torch.arange(3000).remainder(100).to(torch.uint8).view(50, 60)
    model.register_buffer("weight", values.as_subclass(Packed))
    own = model_fingerprint(model)
    assert model_fingerprint(model) == own
    values[0, 1] += 1  # not among those that are sampled
    assert model_fingerprint(model) != own


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint16, torch.uint32])
def test_weights_of_every_dtype_have_a_fingerprint(dtype):
    def model(seed):
        made, draw = nn.Module(), torch.Generator().manual_seed(seed)
        made.register_buffer("weight", torch.randint(0, 255, (64, 16), generator=draw, dtype=torch.uint8).view(dtype))
        return made

    assert model_fingerprint(model(0)) == model_fingerprint(model(0)) != model_fingerprint(model(1))


def test_content_of_any_kind_is_read_in_inference_mode():
    text = torch.arange(6.0).view(2, 3)
    prompt = Wrapped(text)
    with torch.inference_mode():
        assert content_fingerprint({"text": prompt}) == content_fingerprint({"text": text})
        assert content_fingerprint({"text": prompt}) != content_fingerprint({"text": text + 1})


# -- settings and content ----------------------------------------------------------------------------------------------


def test_a_models_fingerprint_changes_with_what_changes_its_keys():
    model = network()
    own = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == own
    assert model_fingerprint(network(1)) != own
    assert model_fingerprint(network().double()) != own
    wrapped = lambda x, sigma: model(x)  # noqa: E731 - what users write around a network
    assert model_fingerprint(wrapped) != own  # another denoiser may prepare its input otherwise
    assert model_fingerprint(wrapped) == model_fingerprint(wrapped)
    with torch.no_grad():  # a fused LoRA: a small change of low rank everywhere in one matrix
        model[0].weight += 1e-3 * torch.randn(300, 1) @ torch.randn(1, 5)
    assert model_fingerprint(model) != own
    with pytest.raises(KVCacheError, match="no torch module"):
        model_fingerprint(lambda x, sigma: x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_does_not_count():
    model, content = network(), {"clip": torch.randn(3, 5).t(), "flags": torch.arange(7) > 3, "none": torch.empty(0)}
    own, of_content = model_fingerprint(model), content_fingerprint(content)
    assert of_content == content_fingerprint({name: value.cuda() for name, value in content.items()})
    model[0].cuda()
    assert model_fingerprint(model) == own  # also where a model lies on several devices


def test_an_adapter_that_is_not_fused_counts_too():
    model = network()
    own = model_fingerprint(model)
    model[0].scaling = {"default": 1.0}
    adapted = model_fingerprint(model)
    model[0].scaling = {"default": 0.5}
    assert len({own, adapted, model_fingerprint(model)}) == 3


def test_weights_of_any_kind_have_a_fingerprint():
    empty = nn.Linear(3, 3, device="meta")
    assert model_fingerprint(empty) == model_fingerprint(nn.Linear(3, 3, device="meta"))
    odd = nn.Module()
    odd.register_buffer("steps", torch.arange(1000).view(50, 20).t())
    odd.register_buffer("nothing", torch.empty(0))
    odd.register_buffer("number", torch.tensor(3))
    own = model_fingerprint(odd)
    odd.register_buffer("cache", torch.randn(4), persistent=False)  # filled by a first call, say
    assert model_fingerprint(odd) == own
    odd.number += 1
    assert model_fingerprint(odd) != own


def test_arguments_are_told_apart_by_content():
    x = torch.randn(2, 3)
    given_ = {"cond": x, "scales": [1, 2.5], "names": ("a", None), "nested": {"flag": True, "dtype": torch.float16}}
    own = content_fingerprint(given_)
    assert content_fingerprint(dict(reversed(given_.items()))) == own
    assert content_fingerprint({**given_, "cond": x.clone()}) == own
    others = [
        {**given_, "cond": x + 1e-6},
        {**given_, "cond": x.view(3, 2)},
        {**given_, "cond": x.double()},
        {**given_, "scales": [1, 2]},
        {**given_, "scales": [12.5]},
        {**given_, "names": ("aN", "one")},
        {**given_, "nested": {"flag": 1, "dtype": torch.float16}},
        {**given_, "more": None},
    ]
    assert len({own, *map(content_fingerprint, others)}) == len(others) + 1
    with pytest.raises(KVCacheError, match=r"cond\['callback'\] is a function, which has no"):
        content_fingerprint({"cond": {"callback": lambda: 0}})


def calling(function):
    """A network behind a function, as `call=` of a denoiser."""
    model = network()
    model.call = function
    return model


def chosen(name):
    return name in {"red", "green", "blue"}


GAIN, STEPS, helper = 1.0, torch.arange(5.0), chosen


def closing_over(gain):
    return lambda m, z: m(z * gain)


class Attributed(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.inner, self.gain = network(), gain

    def _prepared(self, z):
        return z * self.gain


def replaced(name, value):
    """A model whose function reads a global that is replaced before its fingerprint is taken."""

    def make(monkeypatch):
        monkeypatch.setitem(globals(), name, value)
        return calling(lambda m, z: helper(m(z * GAIN) + STEPS))

    return make


class Reduction(Enum):
    MEAN, SUM = 1, 2


class Processor:
    """Such as an attention processor."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, z):
        return z * self.scale


class Shifted(Processor):
    def __call__(self, z):
        return z + self.scale


def hooked_by(hook):
    model = network()
    model[0].register_forward_hook(hook)
    return model


def given_by_keyword(gain):
    def call(m, z, *, gain=gain):
        return m(z * gain)

    return call


def row_by_row(name, value):
    """Like `replaced`, of a global that is read inside an inner function."""

    def make(monkeypatch):
        monkeypatch.setitem(globals(), name, value)
        return calling(lambda m, z: torch.stack([helper(row) for row in m(z)]))

    return make


def in_a_part(value):
    def make(monkeypatch):
        package = ModuleType("users_package")
        package.part = ModuleType("users_package.part")
        package.part.value = value
        monkeypatch.setitem(globals(), "helper", package)
        return calling(lambda m, z: m(z) * helper.part.value)

    return make


@dataclass(slots=True)
class Slotted:
    gain: float


def doubled(x: torch.Tensor):
    return 2 * x


def tripled(x: torch.Tensor):
    return 3 * x


@torch.library.custom_op("kvlock_tests::doubled", mutates_args=())
def doubled_op(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@torch.library.custom_op("kvlock_tests::tripled", mutates_args=())
def tripled_op(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


class Rescaling:
    """A decorator as a class, of which only the function it wraps is a function."""

    def __init__(self, function, scale):
        update_wrapper(self, function)
        self.function, self.scale = function, scale

    def __call__(self, x):
        return self.function(x) * self.scale


class OneSlot:
    __slots__ = "gain"

    def __init__(self, gain):
        self.gain = gain


class Unsaved(nn.Module):
    """It saves nothing of itself, as a module that is fetched anew."""

    def __init__(self, gain):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), gain))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise NotImplementedError


def rewritten(monkeypatch):
    """The same weights in a class whose author has changed a method that its forward calls."""
    monkeypatch.setattr(Attributed, "_prepared", lambda self, z: 3 * z)
    return Attributed(1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda _: calling(lambda m, z: m(z * 1.0)), lambda _: calling(lambda m, z: m(z * 9.0))),
        (lambda _: calling(lambda m, z: m(z * 2.0)), lambda _: calling(lambda m, z: m(z + 2.0))),
        (lambda _: calling(closing_over(torch.ones(5))), lambda _: calling(closing_over(torch.full((5,), 2.0)))),
        (lambda _: Attributed(torch.ones(3)), lambda _: Attributed(torch.full((3,), 2.0))),
        (replaced("GAIN", 1.0), replaced("GAIN", 2.0)),
        (replaced("STEPS", torch.zeros(5)), replaced("STEPS", torch.ones(5))),
        (replaced("helper", lambda x: x + 1), replaced("helper", lambda x: x + 2)),
        (lambda _: calling(given_by_keyword(1.0)), lambda _: calling(given_by_keyword(2.0))),
        (row_by_row("helper", lambda x: x + 1), row_by_row("helper", lambda x: x + 2)),
        (in_a_part(1.0), in_a_part(2.0)),
        *(
            (replaced("helper", make(doubled)), replaced("helper", make(tripled)))
            for make in (lru_cache, torch.jit.script, torch.no_grad())
        ),
        (replaced("helper", doubled_op), replaced("helper", tripled_op)),
        (replaced("helper", SimpleNamespace(gain=1.0)), replaced("helper", SimpleNamespace(gain=2.0))),
        *(
            (lambda _, value=value: Attributed(value), lambda _, other=other: Attributed(other))
            for value, other in (
                ([torch.ones(2)], [torch.zeros(2)]),
                ({"a": {"b": np.ones(2)}}, {"a": {"b": np.zeros(2)}}),
                ({1, 2}, {1, 3}),
                (deque([1.0]), deque([2.0])),
                (range(2), range(3)),
                (Fraction(1, 2), Fraction(1, 3)),
                (Slotted(1.0), Slotted(2.0)),
                (OneSlot(1.0), OneSlot(2.0)),
                (Rescaling(doubled, 1.0), Rescaling(doubled, 2.0)),
                (Rescaling(doubled, 1.0), Rescaling(tripled, 1.0)),
                (Unsaved(1.0), Unsaved(2.0)),
                (bytearray(b"one"), bytearray(b"two")),
                (Reduction.MEAN, Reduction.SUM),
                (SimpleNamespace(scale=1.0), SimpleNamespace(scale=2.0)),
                (Processor(1.0), Processor(2.0)),
                (Processor(1.0), Shifted(1.0)),
                (MethodType(lambda _, z: z, 0), MethodType(lambda _, z: 2 * z, 0)),
            )
        ),
        (lambda _: hooked_by(lambda m, i, out: out), lambda _: hooked_by(lambda m, i, out: 2 * out)),
        (lambda _: Attributed(1.0), rewritten),
    ],
)
def test_what_a_function_around_the_network_does_counts(monkeypatch, one, other):
    own = model_fingerprint(one(monkeypatch))
    assert own == model_fingerprint(one(monkeypatch))
    assert own != model_fingerprint(other(monkeypatch))


def test_a_layer_that_drops_counts_with_its_mode():
    plain, dropping = nn.Sequential(network(), nn.Dropout(0.0)), nn.Sequential(network(), nn.Dropout(0.5))
    assert model_fingerprint(plain.train()) == model_fingerprint(plain.eval())
    for model in (dropping, Attributed(1.0), nn.BatchNorm2d(3)):  # a user's own may ask for it anywhere
        assert model_fingerprint(model.train()) != model_fingerprint(model.eval())


def test_what_changes_while_a_model_runs_does_not_count():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self._seen = 0

        def get_extra_state(self):
            return self._seen

    model = Running()
    before = model_fingerprint(model)
    model._seen += 1
    assert model_fingerprint(model) == before


def test_models_that_no_class_describes_have_a_fingerprint():
    class Settings:
        def __init__(self, **data):
            self.__dict__["data"] = data

        def __getattr__(self, name):
            return self.data[name]  # a KeyError where an AttributeError is expected

    scripted = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert model_fingerprint(scripted) == model_fingerprint(scripted)
    one, other = (Attributed(Settings(gain=gain)) for gain in (1.0, 2.0))
    assert model_fingerprint(one) == model_fingerprint(one)
    assert model_fingerprint(one) != model_fingerprint(other)


def test_weights_that_torch_has_packed_count():
    def quantized(factor):
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(factor)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert model_fingerprint(quantized(1)) == model_fingerprint(quantized(1))
        assert model_fingerprint(quantized(1)) != model_fingerprint(quantized(2))


def test_code_in_a_folder_that_sounds_like_a_librarys_counts(monkeypatch):
    users, package = ModuleType("users_net"), ModuleType("installed_net")
    users.__file__, package.__file__ = "my-packages/net.py", "dist-packages/net.py"
    for each in (users, package):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    assert [module._of_library(each) for each in (users, package)] == [False, True]


def test_which_object_is_shared_counts_and_what_others_do_does_not():
    def made(third):
        model, a, b = network(), Processor(1.0), Processor(2.0)
        model[0].processors, model[2].processor = [a, b], (a, b)[third]
        model.log, model.names = logging.getLogger("one"), np.array(["cat", "dog"])
        model.many = {Processor(n) for n in range(5)}
        return model_fingerprint(model)

    own = made(0)
    logging.getLogger(f"another {own}").setLevel(logging.ERROR)
    assert made(0) == own != made(1)


def test_an_object_counts_that_a_function_names_and_a_module_holds():
    def made(mean):
        prior = torch.distributions.Normal(mean, 1.0)  # a library's, so that the function alone says only its class
        model = calling(lambda m, z: m(z) + prior.mean)
        model[0].prior = prior
        return model_fingerprint(denoiser_of(model))

    assert made(0.0) == made(0.0) != made(1.0)


def denoiser_of(model):
    return lambda z, sigma: model.call(model, z)


def test_networks_that_nothing_leads_to_count():
    def made(seed):
        return CacheSession(KVCache(), network(), layers(networks=(network(seed),)))

    clip = torch.zeros(1, 4, 2, 4, 4)
    given_ = clip, clip + 1, Selection(torch.ones(1, 8)), None, {}
    assert made(1).entry(*given_).name == made(1).entry(*given_).name != made(2).entry(*given_).name


def test_functions_that_call_each_other_end():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert model_fingerprint(calling(even)) == model_fingerprint(calling(even))


def test_fingerprints_are_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_kv_cache_fingerprint import *\n"
        "x = torch.arange(12.0).view(3, 4)\n"
        "print(model_fingerprint(network()), model_fingerprint(calling(chosen)), "
        "content_fingerprint({'b': {3, 1}, 'a': x.bfloat16()}))"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    x = torch.arange(12.0).view(3, 4)
    here = [
        model_fingerprint(network()),
        model_fingerprint(calling(chosen)),
        content_fingerprint({"a": x.bfloat16(), "b": {1, 3}}),
    ]
    assert there.stdout.split() == here


# -- entries ----------------------------------------------------------------------------------------------------------


def layers(names=("0.attn", "1.attn"), networks=()):
    return AttentionLayers((1, 2, 2), tuple(AttentionLayer(name, nn.Identity()) for name in names), networks=networks)


class Parts:
    """Everything that K/V depend on; `entry` looks up the entry with some of it changed."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.clip = torch.randn(1, 4, 2, 4, 4, generator=generator)
        self.given = {
            "cache": {},
            "model": network(),
            "layers": layers(),
            "clip": self.clip,
            "noise": self.clip + 1,
            "weight": torch.ones(1, 8),
            "expert": None,
            "arguments": {"cond": self.clip, "scale": 2.0},
        }

    def entry(self, **changes):
        given = self.given | changes
        session = CacheSession(KVCache(**given["cache"]), given["model"], given["layers"])
        names = ("clip", "noise", "weight", "expert", "arguments")
        clip, noise, weight, expert, arguments = (given[name] for name in names)
        return session.entry(clip, noise, Selection(weight), expert, arguments)


def test_everything_that_keys_and_values_depend_on_is_another_entry():
    parts = Parts()
    own = parts.entry().name
    weight = torch.ones(1, 8)
    weight[0, 3] = 0.5
    changes = [
        {"model": network(1)},
        {"clip": parts.clip + 1e-6},
        {"noise": parts.clip},
        {"noise": (parts.clip + 1).double()},
        {"weight": weight},
        {"layers": layers(("0.attn",))},
        {"arguments": {"cond": parts.clip, "scale": 2}},
        {"arguments": {"cond": parts.clip + 1e-6, "scale": 2.0}},
        {"cache": {"format": None}},
    ]
    names = {own, *(parts.entry(**change).name for change in changes)}
    with torch.autocast("cpu", torch.bfloat16):
        names.add(parts.entry().name)
    assert len(names) == len(changes) + 2
    same = [
        {},
        {"model": network()},
        {"clip": parts.clip.clone(), "arguments": {"scale": 2.0, "cond": parts.clip.clone()}},
        {"cache": {"every": 5, "ratio": 1.2, "budget": "1GB"}},
        {"expert": 1},  # there is one network
    ]
    assert {parts.entry(**change).name for change in same} == {own}


def test_each_of_several_networks_has_its_own_entry():
    parts, nets = Parts(), (network(), network(1))
    given = {"layers": layers(("0.a", "0.b", "1.a", "1.b"), nets)}
    first, second = parts.entry(**given, expert=0), parts.entry(**given, expert=nets[1])
    assert (first.layers, second.layers) == (("0.a", "0.b"), ("1.a", "1.b"))
    assert first.name != second.name
    for unknown in (None, 2, network()):
        with pytest.raises(AttentionError, match=r"has 2 networks[^$]*expert\(sigma\) that returns"):
            parts.entry(**given, expert=unknown)


def test_a_session_reads_content_once_and_holds_few_objects(monkeypatch):
    parts, read = Parts(), []
    real = module._add
    monkeypatch.setattr(module, "_add", lambda text, tensors, *rest: (real(text, tensors, *rest), read.extend(tensors)))
    session = CacheSession(KVCache(), parts.given["model"], parts.given["layers"])
    selection = Selection(parts.given["weight"])

    def entry(cond):
        read.clear()
        return session.entry(parts.clip, parts.given["noise"], selection, None, {"cond": cond})

    cond = torch.zeros(3)
    first = entry(cond)
    assert read
    assert entry(cond) is first
    assert not read
    assert entry(cond.clone()) is first  # other objects of the same content
    assert read
    cond.add_(1)
    assert entry(cond) is not first  # a change in place is noticed
    for i in range(2, 12):
        entry(torch.full((3,), float(i)))
    assert len(session._known) == 8
    name, closed = first.name, weakref.ref(first)
    del first
    session.close()
    assert closed() is None
    assert entry(torch.zeros(3)).name == name
    session.close()
    session.close()


def test_why_the_keys_and_values_of_some_layers_cannot_be_kept():
    watched = AttentionLayers((1, 2, 2), watch=network())
    by_row = AttentionLayers((1, 2, 2), (AttentionLayer("a", nn.Identity()),), architecture="k1", rows_apart=True)
    for wrong, message in ((watched, "declare it"), (by_row, "architecture 'k1' cannot be kept")):
        assert message in (uncacheable(wrong) or "")


def test_a_module_that_nothing_else_knows_counts():
    class Mine:
        def __init__(self, adapter):
            self.model, self.tools = network(), {"adapter": adapter}

    torch.manual_seed(0)
    adapter = nn.Linear(3, 3)
    mine = Mine(adapter)
    own = model_fingerprint(mine)
    assert model_fingerprint(mine) == own
    with torch.no_grad():
        adapter.weight.mul_(3)
    assert model_fingerprint(mine) != own


@pytest.mark.parametrize("direct", [True, False])
def test_the_code_of_a_users_other_file_counts(monkeypatch, direct):
    helpers = ModuleType("helpers_of_a_user")
    monkeypatch.setitem(sys.modules, helpers.__name__, helpers)

    def written(code):
        exec(code, helpers.__dict__)
        scope = {"helpers": helpers, "shaped": helpers.shaped}
        exec(f"def call(m, z): return m({'shaped' if direct else 'helpers.shaped'}(z))", scope)
        model = calling(scope["call"])
        return model_fingerprint(model)

    first, again = written("def shaped(z): return z"), written("def shaped(z): return z")
    assert first == again != written("def shaped(z): return 3 * z")


def test_odd_modules_beside_a_network_have_a_fingerprint():
    class Mine:
        def __init__(self, other):
            self.model, self.other = network(), other

    class Unready(nn.Module):
        def __init__(self):
            pass

    sparse = nn.Module()
    sparse.register_buffer("eye", torch.eye(3).to_sparse())
    for other in (sparse, nn.LazyLinear(3), Unready()):
        assert model_fingerprint(Mine(other)) == model_fingerprint(Mine(other))


@pytest.mark.parametrize("several", [False, True])
def test_weights_that_accelerate_took_away_are_read(several):
    accelerate = pytest.importorskip("accelerate")
    found = []
    for factor in (1.0, 1.0, 1.05):
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(factor)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        if several:
            accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook(), append=True)
        assert model[0].weight.is_meta
        found.append(model_fingerprint(model))
    assert found[0] == found[1] != found[2]


def test_a_name_that_is_bound_later():
    def make():
        model = network()

        def denoiser(x, sigma):
            return model(x) if later is None else x

        first = model_fingerprint(denoiser)
        later = None
        return first, model_fingerprint(denoiser)

    first, second = make()
    assert first != second


def test_default_values_count_beside_a_name_that_is_called_so():
    def made(value):
        scope = {"defaults": 1.0, "network": network()}
        exec(f"def denoiser(x, sigma, scale={value}): return network(x) * scale * defaults", scope)
        return model_fingerprint(scope["denoiser"])

    assert made(1.0) != made(2.0)


def test_what_somebody_put_into_a_class_of_a_library_counts_and_so_does_its_version(monkeypatch):
    model = network()
    first = model_fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.LayerNorm, "forward", lambda self, x: x)
        assert model_fingerprint(model) != first
        patch.setattr(nn.LayerNorm, "forward", update_wrapper(lambda self, x: x, nn.Linear.forward))
        assert model_fingerprint(model) != first  # whatever it says that it is
    assert model_fingerprint(model) == first
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert model_fingerprint(model) != first
