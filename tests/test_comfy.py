"""ComfyUI's attention: a stand-in of its contract always; its own networks where COMFYUI_PATH names a checkout."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kvlock_sampling as kv
from kvlock_sampling.attention import Architecture
from kvlock_sampling.attention.layers import Table, TokenFlow
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


def sampled(made, policy, **options):
    _, denoiser, layers = made
    g = torch.Generator().manual_seed(1)
    source, cond = torch.randn(2, 4, 2, 4, 4, generator=g), torch.randn(2, 3, 8, generator=g)
    mask = torch.zeros(2, 1, 2, 4, 4)
    mask[..., 1:3, 1:3] = 1
    lock = kv.KVLock(denoiser, source=source, mask=mask, policy=policy, layers=layers, **options)
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


class Block(SelfAttention):
    """As in Flux: a block calls attention in its own forward, on text and video."""

    def forward(self, x, pe, modulation_dims=None, transformer_options={}):  # noqa: B006 - as ComfyUI writes it
        return x + super().forward(x + pe, transformer_options=transformer_options)


class Joint(Network):
    def __init__(self, padded_to: int = 1) -> None:
        super().__init__()
        self.read, self.table = nn.Linear(8, 16), nn.Parameter(torch.randn(1, 64, 16))
        self.pad_tokens_multiple = padded_to
        self.blocks = nn.ModuleList(Block("heads apart") for _ in range(2))

    def forward(self, z, t, cond, dims=None):
        video, text = self.embed(z.flatten(2).mT) + t.view(-1, 1, 1), self.read(cond)
        count, multiple = video.shape[1], self.pad_tokens_multiple
        video, text = (nn.functional.pad(x, (0, 0, 0, -x.shape[1] % multiple), value=0.5) for x in (video, text))
        x = torch.cat([text, video], 1)
        table = self.table[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x, pe=table, modulation_dims=dims, transformer_options=self.options)
        return self.head(x[:, text.shape[1] :])[:, :count].mT.reshape(z.shape)


JOINT = Architecture(
    "flux-like",
    ("test_comfy:Joint",),
    layers=("blocks.*",),
    patch=(1, 1, 1),
    text="first",
    text_arguments=("cond",),
    flow=TokenFlow(
        "head",
        tokens=("img", "x"),  # blocks of two kinds may name them otherwise
        tables=(Table("pe", 1),),
        supported=lambda network: network.pad_tokens_multiple == 1,
    ),
    padding="pad_tokens_multiple",
)


@pytest.mark.parametrize(("padded_to", "interleaves"), [(1, True), (1, False), (5, False)])
def test_a_layer_may_be_a_block_of_text_and_video_with_padding(padded_to, interleaves):
    network = Joint(padded_to).requires_grad_(False)
    layers = replace(JOINT, flow=replace(JOINT.flow, interleaves=interleaves)).find(network)
    assert layers.blocks == (tuple(network.blocks),)
    assert layers.narrows == (padded_to == 1)
    denoiser, cond = kv.FlowDenoiser(network), torch.randn(2, 3, 8)
    check_layers(denoiser, torch.randn(2, 4, 2, 4, 4), {"cond": cond}, layers=layers, half=None)


@pytest.mark.parametrize(
    ("dims", "options", "named"),
    [
        ([(0, 16)], {}, "modulation_dims= "),
        (None, {"patches": {"attn2_patch": [print]}}, r'transformer_options\["patches"\] '),
    ],
)
def test_tokens_that_are_named_by_position_are_not_left_out(dims, options, named):
    network = Joint().requires_grad_(False)
    network.options = options
    denoiser = kv.FlowDenoiser(network, call=lambda network, z, t, cond: network(z, t, cond, dims=dims))
    made = network, denoiser, JOINT.find(network)
    with pytest.raises(AttentionError, match=named + r"may name tokens by their position.*\n  Pass foreground="):
        sampled(made, "full")
    sampled(made, "full", foreground=False)


REAL = """
import json, os, sys
from dataclasses import replace
from importlib import import_module
from unittest.mock import MagicMock
sys.argv[1:] = ["--cpu", *sys.argv[1].split()]
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options; comfy.options.enable_args_parsing()
import torch, comfy.ops
import kvlock_sampling as kv
from kvlock_sampling.testing import check_layers
sys.modules["torchvision"] = MagicMock()  # Cosmos imports it for padding masks, which are not used here
torch.manual_seed(0)
R, T = torch.randn, torch.full
CLIP, PICTURE = (2, 4, 3, 4, 8), (2, 4, 4, 8)
WAN = dict(patch_size=(1, 2, 2), in_dim=4, dim=48, ffn_dim=64, freq_dim=32, text_dim=16, out_dim=4, num_heads=4,
           num_layers=2)
JOINT = dict(in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=16, hidden_size=48, mlp_ratio=2.0, num_heads=2,
             depth=2, depth_single_blocks=2, axes_dim=[8, 8, 8], theta=100, qkv_bias=True, guidance_embed=True)
FLUX = dict(JOINT, patch_size=2, txt_ids_dims=[])
FLUX_2 = dict(FLUX, vec_in_dim=None, txt_ids_dims=[2], global_modulation=True, mlp_silu_act=True, ops_bias=False)
CHROMA = dict(FLUX, in_channels=16, out_channels=16, vec_in_dim=None, in_dim=64, out_dim=48, hidden_dim=32, n_layers=1)
del CHROMA["guidance_embed"]
HUNYUAN = dict(JOINT, patch_size=[1, 2, 2], byt5=False, meanflow=False, use_cond_type_embedding=False,
               vision_in_dim=None, meanflow_sum=False)
HUNYUAN_15 = dict(HUNYUAN, vec_in_dim=None, depth_single_blocks=0, byt5=True, use_cond_type_embedding=True,
                  vision_in_dim=16)
QWEN = dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=24, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 8, 8))
LTX = dict(in_channels=4, cross_attention_dim=48, attention_head_dim=24, num_attention_heads=2, caption_channels=16,
           num_layers=2)
LTX_2 = dict(LTX, audio_cross_attention_dim=48, audio_attention_head_dim=24, audio_num_attention_heads=2)
COSMOS_2 = dict(max_img_h=32, max_img_w=32, max_frames=16, in_channels=4, out_channels=4, patch_spatial=2,
                patch_temporal=1, model_channels=48, num_blocks=2, num_heads=2, crossattn_emb_channels=16,
                pos_emb_cls="rope3d")
COSMOS = dict(COSMOS_2, extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable",
              affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=8, block_x_format="THWBD")
LUMINA = dict(in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, multiple_of=16, ffn_dim_multiplier=1.0,
              qk_norm=True, cap_feat_dim=16, axes_dims=(8, 8, 8))
Z_IMAGE = dict(LUMINA, dim=256, axes_dims=(32, 48, 48), z_image_modulation=True, pad_tokens_multiple=32)
vec, scale, frame = {"y": R(2, 8)}, {"guidance": T((2,), 4.0)}, R(2, 4, 1, 4, 8)
reference, edited = {"ref_latents": [R(2, 4, 4, 4)]}, {"ref_latents": [R(2, 4, 1, 4, 4)]}
guides = {"keyframe_idxs": torch.rand(2, 3, 32, 2) * 100, "denoise_mask": T((2, 1, 3, 4, 8), 0.0)}
# module, class, sizes, shape of the latents, arguments beside the text, tokens that are neither text nor video
KINDS = {
    "WanModel": ("wan.model", "WanModel", WAN, CLIP, {}),
    "Wan, reference": ("wan.model", "WanModel", dict(WAN, in_dim_ref_conv=4), CLIP,
                       {"reference_latent": frame[:, :, 0]}, {"before": 8}),
    "Wan, contexts": ("wan.model", "WanModel", WAN, CLIP, {"context_latents": [frame]}, {"after": 8}),
    "VaceWanModel": ("wan.model", "VaceWanModel", dict(WAN, vace_layers=1, vace_in_dim=4), CLIP,
                     {"vace_context": R(2, 1, 4, 3, 4, 8), "vace_strength": [1.0]}),
    "CameraWanModel": ("wan.model", "CameraWanModel", dict(WAN, in_dim_control_adapter=1), CLIP,
                       {"camera_conditions": R(2, 1, 3, 32, 64)}),
    "WanModel_S2V": ("wan.model", "WanModel_S2V",
                     dict(WAN, audio_dim=16, num_audio_token=1, cond_dim=4, audio_inject_layers=[0]), CLIP,
                     {"reference_latent": frame}, {"after": 8}),
    "HumoWanModel": ("wan.model", "HumoWanModel", WAN, CLIP, {"reference_latent": frame}, {"after": 8}),
    "SCAILWanModel": ("wan.model", "SCAILWanModel", WAN, CLIP,
                      {"reference_latent": frame, "pose_latents": R(CLIP)}, {"before": 8, "after": 24}),
    "AnimateWanModel": ("wan.model_animate", "AnimateWanModel", dict(WAN, num_layers=5), CLIP,
                        {"pose_latents": R(2, 16, 2, 4, 8)}),
    "CausalWanModel": ("wan.ar_model", "CausalWanModel", WAN, CLIP, {}),
    "WanAnimate2Model": ("wan.model_animate2", "WanAnimate2Model", WAN, CLIP, {}),
    "Flux": ("flux.model", "Flux", FLUX, PICTURE, vec | scale),
    "Kontext": ("flux.model", "Flux", FLUX, PICTURE, vec | scale | reference, {"after": 4}),
    "Kontext, undeclared": ("flux.model", "Flux", FLUX, PICTURE, vec | scale | reference),
    "Flux 2": ("flux.model", "Flux", FLUX_2, PICTURE, scale),
    "Flux 2, reference": ("flux.model", "Flux", FLUX_2, PICTURE,
                          reference | {"ref_latents_method": "index_timestep_zero"}, {"after": 4}),
    "Chroma": ("chroma.model", "Chroma", CHROMA, PICTURE, scale),
    "HunyuanVideo": ("hunyuan_video.model", "HunyuanVideo", HUNYUAN, CLIP, vec | scale),
    "HunyuanVideo, first frame": ("hunyuan_video.model", "HunyuanVideo", HUNYUAN, CLIP,
                                  vec | {"guiding_frame_index": T((2,), 0.0)}),
    "HunyuanVideo 1.5": ("hunyuan_video.model", "HunyuanVideo", HUNYUAN_15, CLIP,
                         scale | {"txt_byt5": R(2, 3, 1472), "clip_fea": R(2, 4, 16)}),
    "HunyuanImage": ("hunyuan_video.model", "HunyuanVideo", dict(HUNYUAN, patch_size=[1, 1], axes_dim=[12, 12]),
                     PICTURE, vec | scale),
    "Qwen-Image": ("qwen_image.model", "QwenImageTransformer2DModel", QWEN, (2, 4, 1, 4, 8),
                   {"attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])}),
    "Qwen-Image, edit": ("qwen_image.model", "QwenImageTransformer2DModel", QWEN, (2, 4, 1, 4, 8),
                         edited | {"ref_latents_method": "index_timestep_zero"}, {"after": 4}),
    "LTX": ("lightricks.model", "LTXVModel", LTX, CLIP, {"attention_mask": None}),
    "LTX, guides": ("lightricks.model", "LTXVModel", LTX, CLIP, {"attention_mask": None} | guides),
    "LTX, weighted guides": ("lightricks.model", "LTXVModel", LTX, CLIP, {"attention_mask": None} | guides
                             | {"guide_attention_entries": [{"pre_filter_count": 32, "strength": 0.5}]}),
    "LTX-2": ("lightricks.av_model", "LTXAVModel", LTX_2, CLIP, {"attention_mask": None}),
    "Cosmos": ("cosmos.model", "GeneralDIT", COSMOS, CLIP, {}),
    "Cosmos-Predict2": ("cosmos.predict2", "MiniTrainDIT", COSMOS_2, CLIP, {}),
    "Lumina 2": ("lumina.model", "NextDiT", LUMINA, PICTURE, {"num_tokens": 5}),
    "Z-Image": ("lumina.model", "NextDiT", Z_IMAGE, PICTURE, {"num_tokens": 5}),
}
class Called(torch.nn.Module):
    def __init__(self, kind, network, fixed):
        super().__init__(); self.kind, self.network, self.fixed = kind, network.requires_grad_(False), fixed
    def forward(self, z, t, cond):
        t = t[:, None].expand(-1, 96) if "guides" in self.kind else t * 1000 if self.kind[0] in "WVCSHA" else t
        z = [z, z.new_ones(len(z), 8, 4, 16)] if self.kind == "LTX-2" else z
        out = self.network(z, t, transformer_options={}, **self.fixed, **cond)
        return out[0] if self.kind == "LTX-2" else out
def tried(kind, module, name, sizes, shape, given, extra={}):
    torch.manual_seed(0)
    how = dict(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    network = getattr(import_module(f"comfy.ldm.{module}"), name)(**sizes, **how)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    rows = {k: v for k, v in given.items() if torch.is_tensor(v) or k in ("ref_latents", "context_latents")}
    called = Called(kind, network, {k: v for k, v in given.items() if k not in rows})
    cond = rows | {"context": R(2, 5, 32 if kind == "LTX-2" else 16)}
    found = kv.find_layers(called).with_extra(**extra)
    apart = [replace(found, flow=replace(found.flow, interleaves=False))] if found.interleaves else []
    for layers in (found, *apart):
        check_layers(kv.FlowDenoiser(called), R(shape), {"cond": cond}, layers=layers, half=None)
    return f"passed, narrows={found.narrows}, interleaves={found.interleaves}"
for kind, declared in KINDS.items():
    try:
        said = tried(kind, *declared)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([kind, said]), flush=True)
"""


@cache
def tried_in_comfyui(flag: str) -> dict[str, str]:
    """What came of tests of tiny networks of ComfyUI's own classes, under a choice of its kernels."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), "-c", REAL, flag],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


WHOLE = "passed, narrows=False, interleaves=False"
SOURCE_PASS = "passed, narrows=True, interleaves=False"
INTERLEAVED = "passed, narrows=True, interleaves=True"


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["", "--use-pytorch-cross-attention", "--use-split-cross-attention"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("WanModel", INTERLEAVED),
        ("Wan, reference", WHOLE),
        ("Wan, contexts", WHOLE),
        ("VaceWanModel", WHOLE),
        ("CameraWanModel", INTERLEAVED),
        ("WanModel_S2V", WHOLE),
        ("HumoWanModel", WHOLE),
        ("SCAILWanModel", WHOLE),
        ("AnimateWanModel", WHOLE),
        ("CausalWanModel", WHOLE),
        ("WanAnimate2Model", "AttentionError: none of the model's 2 attention layers fired"),
        ("Flux", INTERLEAVED),
        ("Kontext", WHOLE),
        ("Kontext, undeclared", "with_extra(after=4)"),
        ("Flux 2", SOURCE_PASS),
        ("Flux 2, reference", WHOLE),
        ("Chroma", SOURCE_PASS),
        ("HunyuanVideo", INTERLEAVED),
        ("HunyuanVideo, first frame", "modulation_dims_img= may name tokens by their position"),
        ("HunyuanVideo 1.5", INTERLEAVED),
        ("HunyuanImage", INTERLEAVED),
        ("Qwen-Image", INTERLEAVED),
        ("Qwen-Image, edit", WHOLE),
        ("LTX", INTERLEAVED),
        ("LTX, guides", INTERLEAVED),
        ("LTX, weighted guides", "mask= may name tokens by their position"),
        ("LTX-2", WHOLE),
        ("Cosmos", WHOLE),
        ("Cosmos-Predict2", WHOLE),
        ("Lumina 2", WHOLE),
        ("Z-Image", WHOLE),
    ],
)
def test_comfyuis_own_networks_are_locked_or_refused(kind, expected, flag):
    assert expected in tried_in_comfyui(flag)[kind]


def test_a_second_stage_goes_on_with_the_noise_and_the_decisions_of_the_first(setup):
    from kvlock_sampling.integrations.comfyui.host import ComfyLock, Stage

    def stepped(lock, x, levels):
        for level, below in itertools.pairwise(levels):
            x = x + (x - lock(x, level.expand(len(x)), **setup.cfg)) / level * (below - level)
        return x

    half = len(setup.sigmas) // 2
    with setup.lock(policy="sigmoid") as lock:
        x, run = stepped(lock, setup.x, setup.sigmas[: half + 1]), lock._run()
        stage = Stage(run.noise.clone(), lock.trace.steps[-1].sigma, run.timeline.last._replace(estimator=None))
    with setup.lock(policy="sigmoid", sigmas=setup.sigmas[half:]) as second:
        ComfyLock(source={"samples": setup.source})._go_on(second, [stage], x, setup.sigmas[half].expand(1))
        stepped(second, x, setup.sigmas[half:])
        assert torch.equal(second._run().noise, stage.noise)
        torch.testing.assert_close(second.trace.steps[0].lock, stage.state.lock)
        assert stage.state.lock.max() > 0
    larger = Stage(torch.cat([stage.noise] * 2), stage.sigma, stage.state)  # of a batch that was run before
    with setup.lock(policy="sigmoid", sigmas=setup.sigmas[half:]) as third:
        ComfyLock(source={"samples": setup.source})._go_on(third, [stage, larger], x, setup.sigmas[half].expand(1))
        assert torch.equal(third._run().noise, stage.noise)
