"""Metrics on clips whose answer is known exactly."""

import math

import pytest
import torch
from first_world.world import MOTIONS, SPEED, Scene, coverage, edit_mask, render, sample_edit, sample_scene
from torch.nn import functional as F
from world.metrics import masked_ssim, temporal_error

from kvlock_sampling.types import MaskError
from kvlock_sampling.video.metrics import masked_mse, masked_psnr

A = torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
LEFT = torch.zeros(2, 1, 4, 16, 16)
LEFT[..., :8] = 1


def test_mse_and_psnr_see_only_the_region_and_each_clip_alone() -> None:
    B = A.clone()
    B[0, ..., :8] += 0.2
    B[1, ..., 8:] += 0.4
    torch.testing.assert_close(masked_mse(A, B, LEFT), torch.tensor([0.04, 0.0]))
    torch.testing.assert_close(masked_mse(A, B), torch.tensor([0.02, 0.08]))
    torch.testing.assert_close(masked_psnr(A, B, LEFT), torch.tensor([20.0, 100.0]))  # 10 log10(4 / 0.04); capped
    torch.testing.assert_close(masked_psnr(A, B, 1 - LEFT[:1]), torch.tensor([100.0, 10 * math.log10(4 / 0.16)]))


def test_fractional_masks_weigh() -> None:
    mask = torch.zeros(1, 1, 1, 2, 2)
    mask[..., 0, 0], mask[..., 1, 1] = 1.0, 0.5
    B = torch.zeros(1, 3, 1, 2, 2)
    B[..., 0, 0], B[..., 1, 1], B[..., 0, 1] = 1.0, 2.0, 9.0
    torch.testing.assert_close(masked_mse(torch.zeros_like(B), B, mask), torch.tensor([(1 * 1 + 0.5 * 4) / 1.5]))


def test_ssim() -> None:
    torch.testing.assert_close(masked_ssim(A, A, LEFT), torch.ones(2))
    flat, brighter = torch.zeros(1, 3, 2, 16, 16), torch.full((1, 3, 2, 16, 16), 0.5)
    c1 = (0.01 * 2) ** 2  # flat pictures have no structure: what remains is (2 m1 m2 + c1) / (m1^2 + m2^2 + c1)
    torch.testing.assert_close(masked_ssim(flat, brighter), torch.tensor([c1 / (0.25 + c1)]), atol=1e-5, rtol=0)
    B = A.clone()
    B[..., 8:] = -B[..., 8:]
    torch.testing.assert_close(masked_ssim(A, B, LEFT), torch.ones(2))
    assert (masked_ssim(A, B, 1 - LEFT) < 0.3).all()
    assert masked_ssim(A[..., :4, :4], A[..., :4, :4]).tolist() == [1, 1], "tiny frames get a smaller window"


def test_whole_pixel_motion_is_exact() -> None:
    still = torch.rand(1, 3, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    clip = torch.cat([still.roll((-t, 2 * t), (-2, -1)) for t in range(4)], 2)  # 2 right, 1 up per frame
    mask = torch.zeros(1, 1, 4, 20, 20)
    mask[..., 6:16, 4:18] = 1
    assert temporal_error(clip, torch.tensor([2.0, -1.0]), mask) < 1e-10
    assert temporal_error(clip, torch.tensor([[[2.0, -1.0]] * 3])) < 1e-10, "what comes from outside does not count"
    assert temporal_error(clip, torch.tensor([0.0, 0.0]), mask) > 0.05
    flash = clip.clone()
    flash[:, :, 2] += 0.3
    expected = torch.tensor([0.09 * 2 / 3])  # into the flash and out of it, of three steps
    torch.testing.assert_close(temporal_error(flash, torch.tensor([[2.0, -1.0]]), mask), expected)


def test_sub_pixel_motion_of_rendered_objects() -> None:
    scenes: list[Scene] = [sample_scene(seed, empty=0.0) for seed in range(30)]
    clips = render(scenes)
    mask = torch.stack([coverage(scene) for scene in scenes])[:, None].gt(0.999).float()
    motion = torch.tensor([[SPEED * v for v in MOTIONS[scene.motion][1]] for scene in scenes])
    assert temporal_error(clips, motion, mask).max() < 1e-6, "flat colours stay what they are"
    noisy = clips + 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(2))
    assert (temporal_error(noisy, motion, mask) > 0.008).all()
    faded = clips * torch.linspace(1, 0.5, 8).view(1, 1, -1, 1, 1)
    assert (temporal_error(faded, motion, mask) > 1e-3).all()


def test_bilinear_shift_of_a_ramp_is_exact() -> None:
    x = torch.arange(20.0).view(1, 1, 1, 1, 20).expand(1, 3, 1, 20, 20) / 20
    clip = torch.cat([x, x - 0.3 / 20], 2)
    assert temporal_error(clip, torch.tensor([0.3, 0.0])) < 1e-10


def test_an_edit_that_keeps_the_background_is_exact_outside_its_mask() -> None:
    source, target = sample_edit(4, "recolour")
    clips, keep = render([source, target]), 1 - edit_mask(source, target)[None]
    assert masked_psnr(clips[1:], clips[:1], keep).tolist() == [100]
    assert masked_mse(clips[1:], clips[:1], keep).tolist() == [0]
    assert masked_ssim(clips[1:], clips[:1], keep).tolist() == [1], "windows at the border do not see the edit"
    outside = clips[1:] + 0.2 * keep
    torch.testing.assert_close(masked_psnr(outside, clips[:1], keep), torch.tensor([20.0]), atol=1e-3, rtol=0)
    assert F.mse_loss(outside * (1 - keep), clips[1:] * (1 - keep)) == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: masked_mse(A, A[:1]), "expected one shape"),
        (lambda: masked_psnr(A[0], A[0]), r"a\[None\]"),
        (lambda: masked_mse(A, A, LEFT[:, :, :2]), r"expected \(2, 1, 4, 16, 16\)"),
        (lambda: masked_mse(A, A, LEFT * 255), r"0.0 to 255.0; expected values in \[0, 1\]"),
        (lambda: masked_mse(A, A, LEFT * 0), "0 everywhere"),
        (lambda: masked_ssim(A, A, torch.zeros_like(LEFT)), "0 everywhere"),
        (lambda: temporal_error(A, torch.zeros(3)), r"expected \(2,\), \(2, 2\) or \(2, 3, 2\)"),
        (lambda: temporal_error(A[:, :, :1], torch.zeros(2)), "2 or more"),
    ],
)
def test_errors(call: object, says: str) -> None:
    with pytest.raises(MaskError, match=says):
        call()  # type: ignore[operator]
