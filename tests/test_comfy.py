"""ComfyUI's attention: a stand-in of its contract always; its own networks where COMFYUI_PATH names a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kvlock_sampling as kv
from kvlock_sampling.attention import Architecture
from kvlock_sampling.testing import check_layers
from kvlock_sampling.types import AttentionError

KEY = "optimized_attention_override"
ROOT = Path(__file__).resolve().parents[1]


def by_hand(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, skip_reshape: bool = False, **_):
    """A kernel that torch's own attention function never sees."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    out = (scores if mask is None else scores + mask).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def optimized_attention(*args, kernel=by_hand, **kwargs):
    """As ComfyUI looks for an override: once for each call, and not again within one."""
    override = (kwargs.get("transformer_options") or {}).get(KEY)
    if "_inside_attn_wrapper" in kwargs or override is None:
        return kernel(*args, **kwargs)
    return override(kernel, *args, **{**kwargs, "_inside_attn_wrapper": True})


class SelfAttention(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.qkv, self.out = form, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, transformer_options={}):  # noqa: B006 - as ComfyUI writes it
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.form == "heads apart":
            q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
            y = optimized_attention(q, k, v, heads=4, skip_reshape=True, transformer_options=transformer_options)
        elif self.form == "by position":
            y = optimized_attention(q, k, v, 4, None, transformer_options=transformer_options)
        else:
            y = optimized_attention(q, k, v, heads=4, transformer_options=transformer_options)
        return self.out(y)


class Network(nn.Module):
    def __init__(self, form: str = "joined") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": SelfAttention(form)}) for _ in range(2))
        self.options: dict = {}

    def forward(self, z, t, cond):
        tokens = self.embed(z.flatten(2).mT) + t.view(-1, 1, 1) + cond.mean((1, 2))[:, None, None]
        for block in self.blocks:
            tokens = tokens + block["attn"](tokens, transformer_options=self.options)
        return self.head(tokens).mT.reshape(z.shape)


FAMILY = Architecture("comfy-like", ("test_comfy:Network",), layers=("blocks.*.attn",), patch=(1, 1, 1))


@pytest.fixture(params=["joined", "heads apart", "by position"])
def made(request):
    network = Network(request.param).requires_grad_(False)
    return network, kv.FlowDenoiser(network), FAMILY.find(network)


def sampled(made, policy):
    _, denoiser, layers = made
    g = torch.Generator().manual_seed(1)
    source, cond = torch.randn(2, 4, 2, 4, 4, generator=g), torch.randn(2, 3, 8, generator=g)
    mask = torch.zeros(2, 1, 2, 4, 4)
    mask[..., 1:3, 1:3] = 1
    lock = kv.KVLock(denoiser, source=source, mask=mask, policy=policy, layers=layers)
    sigmas = kv.samplers.flow_sigmas(4)
    x = torch.randn(source.shape, generator=g) * sigmas[0]
    out = lock.sample("euler", x, sigmas, extra_args={"cond": cond, "uncond": cond * 0, "cond_scale": 2.0})
    return out, lock.trace


def test_the_contract_of_a_layer_holds(made):
    _, denoiser, layers = made
    check_layers(denoiser, torch.randn(2, 4, 2, 4, 4), {"cond": torch.randn(2, 3, 8)}, layers=layers, half=None)


def test_without_options_an_unknown_kernel_is_an_error_and_not_silence(made):
    made[0].options = None
    with pytest.raises(AttentionError, match="none of the model's 2 attention layers fired"):
        sampled(made, "half")


@pytest.mark.parametrize("policy", ["full", "half", "default"])
def test_a_kernel_of_torchs_own_is_fused_once(made, policy, monkeypatch):
    """The override and torch's function both see the call: the result is that of the kernel by hand."""

    def sdpa(q, k, v, heads, mask=None, skip_reshape=False, **_):
        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    expected, trace = sampled(made, policy)
    monkeypatch.setitem(optimized_attention.__kwdefaults__, "kernel", sdpa)
    found, other = sampled(made, policy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [s.fused_layers for s in other] == [s.fused_layers for s in trace]


def test_an_override_that_was_there_is_called_in_every_call(made):
    """It gets what the lock made, and may choose its own kernel; nothing of the lock stays in the options."""
    calls = []

    def theirs(kernel, *args, **kwargs):
        calls.append(args[1].shape)
        return kernel(*args, **kwargs)

    expected, _ = sampled(made, "half")
    made[0].options = options = {KEY: theirs, "block": 1}
    found, trace = sampled(made, "half")
    assert torch.equal(found, expected)
    assert options == {KEY: theirs, "block": 1}
    assert len(calls) == 2 * len(trace)  # a call for both branches and the source, in two layers


def test_off_is_the_bare_network_bit_for_bit(made):
    plain = kv.CFGDenoiser(made[1])
    off, _ = sampled(made, "off")
    g = torch.Generator().manual_seed(1)
    source, cond = torch.randn(2, 4, 2, 4, 4, generator=g), torch.randn(2, 3, 8, generator=g)
    sigmas = kv.samplers.flow_sigmas(4)
    x = torch.randn(source.shape, generator=g) * sigmas[0]
    bare = kv.samplers.euler(plain, x, sigmas, extra_args={"cond": cond, "uncond": cond * 0, "cond_scale": 2.0})
    assert torch.equal(off, bare)


REAL = """
import sys, os
kind, flag = sys.argv[1:]
sys.argv = ["x", "--cpu", *([flag] if flag else [])]
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options; comfy.options.enable_args_parsing()
import torch, comfy.ops, comfy.ldm.wan.model as wan
import kvlock_sampling as kv
from kvlock_sampling.testing import check_layers
torch.manual_seed(0)
more = {"vace_layers": 1, "vace_in_dim": 4} if kind == "VaceWanModel" else {"model_type": "t2v"}
sizes = dict(in_dim=4, dim=48, ffn_dim=64, freq_dim=32, text_dim=16, out_dim=4, num_heads=4, num_layers=2)
how = dict(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
network = getattr(wan, kind)(patch_size=(1, 2, 2), **sizes, **how, **more)
for p in network.parameters():
    torch.nn.init.normal_(p, std=0.1)
class Called(torch.nn.Module):
    def __init__(self):
        super().__init__(); self.network = network.requires_grad_(False)
    def forward(self, z, t, cond):
        extra = {} if kind == "WanModel" else {"vace_context": cond["vace"][:, None].to(z), "vace_strength": [1.0]}
        return self.network(z, t * 1000, context=cond["text"], transformer_options={}, **extra)
cond = {"text": torch.randn(2, 5, 16), "vace": torch.randn(2, 4, 3, 8, 8)}
check_layers(kv.FlowDenoiser(Called()), torch.randn(2, 4, 3, 8, 8), {"cond": cond}, half=None)
print("passed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["", "--use-pytorch-cross-attention", "--use-split-cross-attention"])
@pytest.mark.parametrize("kind", ["WanModel", "VaceWanModel"])
def test_comfyuis_own_networks(kind, flag):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), "-c", REAL, kind, flag],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("passed\n")
