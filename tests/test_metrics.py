"""Metrics on clips whose answer is known exactly."""

import math

import pytest
import torch
from first_world.world import edit_mask, render, sample_edit
from torch.nn import functional as F

from kvlock_sampling.types import MaskError
from kvlock_sampling.video.metrics import masked_psnr

A = torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
LEFT = torch.zeros(2, 1, 4, 16, 16)
LEFT[..., :8] = 1


def test_psnr_sees_only_the_region_and_each_clip_alone() -> None:
    B = A.clone()
    B[0, ..., :8] += 0.2
    B[1, ..., 8:] += 0.4
    torch.testing.assert_close(masked_psnr(A, B), 10 * torch.log10(4 / torch.tensor([0.02, 0.08])))
    torch.testing.assert_close(masked_psnr(A, B, LEFT), torch.tensor([20.0, 100.0]))  # 10 log10(4 / 0.04); capped
    torch.testing.assert_close(masked_psnr(A, B, 1 - LEFT[:1]), torch.tensor([100.0, 10 * math.log10(4 / 0.16)]))


def test_fractional_masks_weigh() -> None:
    mask = torch.zeros(1, 1, 1, 2, 2)
    mask[..., 0, 0], mask[..., 1, 1] = 1.0, 0.5
    B = torch.zeros(1, 3, 1, 2, 2)
    B[..., 0, 0], B[..., 1, 1], B[..., 0, 1] = 1.0, 2.0, 9.0
    mse = torch.tensor([(1 * 1 + 0.5 * 4) / 1.5])
    torch.testing.assert_close(masked_psnr(torch.zeros_like(B), B, mask), 10 * torch.log10(4 / mse))
    arrays = (0 * B.numpy(), B.numpy(), mask.numpy())
    assert torch.equal(masked_psnr(*arrays), masked_psnr(torch.zeros_like(B), B, mask))


def test_an_edit_that_keeps_the_background_is_exact_outside_its_mask() -> None:
    source, target = sample_edit(4, "recolour")
    clips, keep = render([source, target]), 1 - edit_mask(source, target)[None]
    assert masked_psnr(clips[1:], clips[:1], keep).tolist() == [100]
    outside = clips[1:] + 0.2 * keep
    torch.testing.assert_close(masked_psnr(outside, clips[:1], keep), torch.tensor([20.0]), atol=1e-3, rtol=0)
    assert F.mse_loss(outside * (1 - keep), clips[1:] * (1 - keep)) == 0


def test_half_precision_is_measured_in_single() -> None:
    near = A.clamp(-1, 1).bfloat16()
    assert torch.equal(masked_psnr(near, near + 0.004), masked_psnr(near.float(), (near + 0.004).float()))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: masked_psnr(A.numpy(), A.numpy()[:1]), "expected one shape"),
        (lambda: masked_psnr(A[0], A[0]), r"a\[None\]"),
        (lambda: masked_psnr(A, A, LEFT[:, :, :2]), r"expected \(2, 1, 4, 16, 16\)"),
        (lambda: masked_psnr(A, A, LEFT * 255), r"0.0 to 255.0; expected values in \[0, 1\]"),
        (lambda: masked_psnr(A, A, LEFT * 0), "0 everywhere"),
        (lambda: masked_psnr(A, 127.5 * A + 127.5), r"clips up to \d+; expected \[-1, 1\]: clip / 127.5 - 1"),
        (lambda: masked_psnr(A, (127.5 * A + 127.5).byte()), r"clips up to \d+; expected \[-1, 1\]"),
    ],
)
def test_errors(call: object, says: str) -> None:
    with pytest.raises(MaskError, match=says):
        call()  # type: ignore[operator]
