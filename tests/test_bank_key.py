"""A model's fingerprint: every way of writing to a weight shows, whatever torch notes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kvlock_sampling.kv_cache import fingerprint as module
from kvlock_sampling.kv_cache import model_fingerprint


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.Linear(33, 5)).to(dtype)


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
    sums = module._checksums(numbers[offset:])
    assert torch.equal(module._checksums(numbers[offset:].clone()), sums)  # wherever it stands in memory
    one = numbers.view(torch.uint8).view(-1, dtype.itemsize)[offset + at, data.draw(st.integers(0, dtype.itemsize - 1))]
    one.bitwise_xor_(1 << data.draw(st.integers(0, 0 if dtype == torch.bool else 7)))
    assert not torch.equal(module._checksums(numbers[offset:]), sums)


def test_sums_are_of_blocks_so_that_rows_in_another_order_show(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    sums = module._checksums(rows)
    assert not torch.equal(module._checksums(rows.flip(0)), sums)
    assert torch.equal(sums[:50], rows.view(torch.int64).sum(-1))
    assert torch.equal(module._checksums(rows.t().contiguous().t()), sums)  # layout is no matter


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
    assert len({own, changed, model_fingerprint(model)}) == 3
