"""The tests within ComfyUI, `tests/comfyui/`, run in a process of their own: ComfyUI reads its arguments at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_sampling.py", "test_models.py", "test_server.py", "test_browser.py"])
def test_within_comfyui(file, tmp_path):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    expected = tmp_path / "embedded.pt"
    embedded(expected)
    done = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), "-m", "pytest", "-q", file, "-p", "no:cacheprovider"],
        cwd=ROOT / "tests/comfyui",
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "KVLOCK_EMBEDDED": str(expected)},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def embedded(path: Path) -> None:
    """What the embedded model predicts, for ComfyUI's network with the same weights."""
    from kvlock_sampling.tiny import load

    torch.manual_seed(0)
    z, t, prompt = torch.randn(2, 3, 8, 64, 64), torch.tensor([0.9, 0.4]), "a red ball moving left, beside a post"
    torch.save({"z": z, "t": t, "prompt": prompt, "x0": load().network(z, t, [prompt] * 2)}, path)


@pytest.mark.parametrize("noise", [0.0, 1 / 255])
def test_what_grows_is_the_mask_and_not_its_noise(setup, noise):
    """As a JPEG has, whose black is not quite black."""
    from kvlock_sampling.integrations.comfyui.pixels import token_map

    mask = setup.mask[0, 0].clamp_min(noise)
    edited, _ = token_map(setup.model.inner_model.transformer, setup.source, mask, None, grow=1, transition=0.0)
    clean, _ = token_map(
        setup.model.inner_model.transformer, setup.source, setup.mask[0, 0], None, grow=1, transition=0.0
    )
    assert 0 < edited.mean() < 1
    assert torch.equal(edited, clean)
