"""Stored K/V in int8 or unchanged: bounded errors, exact sizes, outliers and numbers that are not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_sampling.kv_cache import KVCacheError
from kvlock_sampling.kv_cache.quantize import layout, level_bytes, pack, packed_bytes, unpack

ALL = (None, "int8")
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9))
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


def numbers(shape, seed, dtype=torch.float32):
    """K/V as models make them: channels of very different sizes, and a few tokens of another size altogether."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp(torch.randn(shape[-1], generator=g) * 2)
    x = x * torch.where(torch.rand(*shape[:-1], 1, generator=g) < 0.2, 30.0, 1.0)
    x = x * (torch.rand(shape, generator=g) > 0.1)
    return x.clamp(-6e4, 6e4).to(dtype)  # float16 ends at 65504


@given(shapes, st.integers(0, 2**31), dtypes)
@settings(max_examples=60, deadline=None)
def test_int8_is_within_half_a_step_of_both_scales(shape, seed, dtype):
    x = numbers(shape, seed, dtype)
    packed = pack(x, "int8")
    step = packed[1]["channel"].double() * packed[1]["token"].double() / 127
    # Half a step, the float32 arithmetic, and the rounding to the dtype that comes back.
    allowed = step * (0.5 + 1e-4) + x.double().abs() * torch.finfo(dtype).eps
    assert (packed[1]["values"].abs() <= 127).all()
    assert ((unpack(packed).double() - x.double()).abs() <= allowed + 1e-30).all()


@given(shapes, st.integers(0, 2**31), dtypes, st.sampled_from(ALL))
@settings(max_examples=60, deadline=None)
def test_sizes_are_known_beforehand_and_nothing_is_shared(shape, seed, dtype, format):
    x = numbers(shape, seed, dtype)
    packed = pack(x, format)
    assert level_bytes({"layer": (packed,)}) == packed_bytes(shape, dtype, format)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in packed[1].items()} == layout(shape, dtype, format)
    before = unpack(packed).clone()
    x.fill_(7)
    after = unpack(packed)
    assert torch.equal(after, before)
    assert after.dtype == dtype
    assert all(p.is_contiguous() for p in packed[1].values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_unchanged_tensors_are_exact(dtype):
    x = numbers((2, 3, 5, 7), 0, dtype)
    assert torch.equal(unpack(pack(x, None)), x)


@pytest.mark.parametrize("format", ALL)
def test_zeros_stay_zeros_and_constants_stay_close(format):
    assert torch.equal(unpack(pack(torch.zeros(1, 2, 5, 4), format)), torch.zeros(1, 2, 5, 4))
    constant = torch.full((1, 2, 5, 4), -3.7)
    assert torch.allclose(unpack(pack(constant, format)), constant, rtol=4e-3)
    assert unpack(pack(torch.zeros(1, 2, 0, 4), format)).shape == (1, 2, 0, 4)


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e20, 3e38])
def test_any_magnitude_survives(format, size):
    x = torch.tensor([[[[1.0, -0.5], [0.25, 1.0]]]]) * size
    out = unpack(pack(x, format))
    assert torch.isfinite(out).all()
    if size >= 1e-38:
        torch.testing.assert_close(out / size, x / size, atol=0.02, rtol=0.07)


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_tensors_that_are_not_finite_are_stored_unchanged(format, bad):
    x = numbers((1, 2, 5, 4), 0)
    x[0, 1, 2, 3] = bad
    packed = pack(x, format)
    assert list(packed[1]) == ["values"]
    assert torch.equal(unpack(packed).view(torch.int32), x.view(torch.int32))


def test_one_loud_token_or_channel_does_not_drown_the_others():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 64, 32, generator=g)
    loud = x.clone()
    loud[0, :, 5] *= 1000
    loud[0, :, :, 7] *= 1000
    calm = torch.ones_like(x, dtype=torch.bool)
    calm[0, :, 5], calm[0, :, :, 7] = False, False

    def off(stored):
        return ((stored - loud)[calm].norm() / loud[calm].norm()).item()

    step = loud.abs().amax((-1, -2), keepdim=True) / 127
    assert off((loud / step).round() * step) > 0.9  # one scale per head keeps nothing of the others
    assert off(unpack(pack(loud, "int8"))) < 0.01


def test_strided_tensors_and_gradients_are_stored_as_plain_values():
    x = numbers((1, 5, 3, 8), 3).transpose(1, 2).requires_grad_()  # (1, 3, 5, 8), as attention layers have them
    for format in ALL:
        packed = pack(x, format)
        assert torch.equal(unpack(packed), unpack(pack(x.detach().contiguous(), format)))
        assert not unpack(packed).requires_grad


@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (5, 6, 8), (6, 8)])
def test_large_tensors_are_packed_some_heads_at_a_time(monkeypatch, shape):
    from kvlock_sampling.kv_cache import quantize as module

    x, seen, real = numbers(shape, 1), [], module._quantize
    whole = pack(x, "int8")
    monkeypatch.setattr(module, "_AT_ONCE", 2 * x.numel() // 5)
    monkeypatch.setattr(module, "_quantize", lambda piece, to: (seen.append(tuple(piece.shape)), real(piece, to))[1])
    pieces = pack(x, "int8")
    assert [s[-3] for s in seen] == [2, 2, 1] if len(shape) > 2 else seen == [shape]
    assert {n: (p.dtype, tuple(p.shape)) for n, p in pieces[1].items()} == layout(shape, x.dtype, "int8")
    torch.testing.assert_close(unpack(pieces), unpack(whole), rtol=1e-2, atol=1e-6)


def test_only_floating_tensors_are_packed():
    with pytest.raises(KVCacheError, match=r"torch.int64 of shape \(2, 2\)"):
        pack(torch.ones(2, 2, dtype=torch.long), "int8")
    with pytest.raises(KVCacheError, match="expected floats"):
        pack(torch.ones(3), "int8")
