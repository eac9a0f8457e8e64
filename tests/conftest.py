"""Small models with random weights, shared by the tests."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor, nn

# The rooms whose signatures are about shapes. Settings classes check and convert their own arguments.
SHAPED = ("guidance", "attention.fuse", "variance.base", "masks")
install_import_hook([f"kvlock_sampling.{room}" for room in SHAPED], "shapes.check")

import kvlock_sampling as kv  # noqa: E402 - after the hook, so that shapes are checked
from kvlock_sampling.utils.extras import hide_broken_torchvision  # noqa: E402

torch.set_num_threads(1)
hide_broken_torchvision()  # before any test imports diffusers


class PromptedWan(nn.Module):
    """A random two-layer Wan behind the call contract of a flow model: `model(z, t, cond=text)`."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        from diffusers import WanTransformer3DModel

        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
            rope_max_seq_len=32,
        )

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.transformer(z, t * 1000, cond.expand(len(z), -1, -1), return_dict=False)[0]


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws from torch's global generator does not depend on the tests before it."""
    torch.manual_seed(0)


SHAPE = (1, 4, 3, 8, 8)


class Setup:
    """A denoiser, a source, a mask, prompts and a schedule that fit together."""

    def __init__(self, batch: int = 1, seed: int = 0) -> None:
        torch.manual_seed(1234)
        self.model = kv.FlowDenoiser(PromptedWan()).eval().requires_grad_(False)
        with torch.no_grad():
            for p in self.model.parameters():  # livelier than the library's initialisation
                if p.ndim >= 2:
                    p.mul_(3)
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *SHAPE[1:])
        self.source = torch.randn(shape, generator=generator)
        self.mask = torch.zeros(batch, 1, *SHAPE[2:])
        for clip in range(batch):
            self.mask[clip, :, :, 2 : 5 + clip, 1:6] = 1
        self.cond = torch.randn(batch, 3, 8, generator=generator)
        self.uncond = torch.zeros(1, 3, 8).expand(batch, -1, -1).clone()
        self.sigmas = kv.samplers.flow_sigmas(6)
        self.x = torch.randn(shape, generator=generator) * self.sigmas[0]
        self.cfg = {"cond": self.cond, "uncond": self.uncond, "cond_scale": 3.0}

    def lock(self, **arguments: object) -> kv.KVLock:
        return kv.KVLock(self.model, **{"source": self.source, "mask": self.mask, **arguments})


@pytest.fixture
def setup() -> Setup:
    return Setup()


@pytest.fixture
def pair() -> Setup:
    """Two clips with different masks."""
    return Setup(batch=2)
