"""Masks: pooling against brute force, laws of the morphology, converters, and what the errors say."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import kvlock_sampling as kv
from kvlock_sampling import masks
from kvlock_sampling.masks.fitted import FittedMask, as_transition
from kvlock_sampling.types import MaskError

quick = settings(max_examples=30, deadline=None)


sizes = st.integers(1, 6)


def clips(height=sizes, width=sizes):
    shape = st.tuples(st.integers(1, 5), height, width)
    return shape.flatmap(lambda s: arrays(np.float32, s, elements=st.sampled_from([0.0, 1.0]))).map(torch.from_numpy)


# the normal form


@pytest.mark.parametrize(
    ("shape", "normal"),
    [
        ((6, 8), (1, 1, 1, 6, 8)),
        ((5, 6, 8), (1, 1, 5, 6, 8)),
        ((1, 5, 6, 8), (1, 1, 5, 6, 8)),
        ((3, 5, 6, 8), (3, 1, 5, 6, 8)),
        ((3, 1, 5, 6, 8), (3, 1, 5, 6, 8)),
    ],
)
def test_as_mask_accepts_every_usual_shape(shape, normal):
    mask = torch.rand(shape)
    assert masks.as_mask(mask).shape == normal
    assert torch.equal(masks.as_mask(mask).flatten(), mask.flatten())


def test_as_mask_values_and_dtypes():
    assert torch.equal(masks.as_mask(torch.tensor([[True, False]])).flatten(), torch.tensor([1.0, 0.0]))
    bytes_ = torch.tensor([[0, 1, 51, 127, 128, 255]], dtype=torch.uint8)  # noise and faint values are not edited
    assert torch.equal(masks.as_mask(bytes_).flatten(), torch.tensor([0.0, 0, 0, 0, 1, 1]))
    assert torch.equal(masks.from_keep_mask(255 - bytes_).flatten(), torch.tensor([0.0, 0, 0, 0, 1, 1]))
    assert torch.equal(
        masks.as_mask(torch.tensor([[0, 0.2, 1]])).flatten(), torch.tensor([0, 0.2, 1])
    )  # soft on purpose
    assert masks.as_mask(np.ones((2, 2))).dtype == torch.float64
    assert masks.as_mask(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_numpy_masks_may_be_flipped_or_read_only(recwarn):
    array = np.eye(4, dtype=np.float32)
    array.flags.writeable = False
    assert torch.equal(masks.as_mask(array[::-1]), masks.as_mask(torch.eye(4).flip(0)))
    assert torch.equal(masks.from_comfy(array), masks.as_mask(torch.eye(4)))
    assert not recwarn.list


@pytest.mark.parametrize("mask", [Path("a/mask.png"), "a/mask.png"])
def test_a_path_is_no_mask(mask):
    for read in (masks.as_mask, masks.from_comfy, masks.from_diffusers, FittedMask):
        with pytest.raises(MaskError, match=r"(?s)path 'a/mask.png'.*read_mask\('a/mask.png'"):
            read(mask)
    with pytest.raises(MaskError, match="mask is a dict; expected a tensor or array"):
        masks.as_mask({})


@pytest.mark.parametrize("transition", [1, "ab", (1, "a"), [1], (0, 0.5), (1, 2), (float("nan"), 0.5)])
def test_a_transition_band_is_a_pair_of_numbers(transition):
    with pytest.raises(MaskError, match="expected \\(width in tokens > 0"):
        as_transition(transition)
    assert as_transition([1, 0.5]) == as_transition((1, 0.5)) == (1.0, 0.5)


def test_a_transition_band_may_be_a_list():
    like, mask = torch.zeros(1, 4, 2, 8, 8), FittedMask(torch.eye(8))
    wanted = mask.background(like, (1, 2, 2), (1, 0.5))
    assert torch.equal(mask.background(like, (1, 2, 2), [1, 0.5]), wanted)
    assert torch.equal(mask.selection(like, (1, 2, 2), [1, 0.5])[1], mask.selection(like, (1, 2, 2), (1, 0.5))[1])


def test_reach_is_in_widths_of_the_edited_tokens():
    """Four tokens are two wide: half of that is one token, and the corners are further away. No edit, no reach."""
    like, mask = torch.zeros(1, 4, 2, 12, 12), torch.zeros(1, 1, 2, 12, 12)
    mask[..., 0, 4:8, 4:8] = 1
    near = 1 - FittedMask(mask, 0.5).kept(0.0, like, (1, 2, 2)).view(2, 6, 6)
    wanted = torch.zeros(6, 6)
    wanted[1:5, 2:4] = wanted[2:4, 1:5] = 1
    assert torch.equal(near, torch.stack([wanted, torch.zeros(6, 6)]))


@given(st.integers(0, 2**31), st.floats(0.1, 2), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_reach_grows_with_its_number_and_is_each_clips_own(seed, reach, batch):
    mask = torch.rand(batch, 1, 2, 8, 8, generator=torch.Generator().manual_seed(seed)).gt(0.9)
    mask[:, :, 0, 0, 0] = True
    like = torch.zeros(batch, 4, 2, 8, 8)
    far, further = (FittedMask(mask, r).kept(0.0, like, (1, 2, 2)) for r in (reach, 1.5 * reach))
    assert (further <= far).all()
    edited = FittedMask(mask).tokens(like, (1, 2, 2))
    assert not far[edited].any()
    alone = [FittedMask(clip[None], reach).kept(0.0, like[:1], (1, 2, 2)) for clip in mask]
    assert torch.equal(far, torch.cat(alone))


def test_packed_latents_have_no_grid_to_be_near_on():
    like, mask = torch.zeros(1, 16, 4), FittedMask(torch.eye(16)[:1, :, None], 0.5)
    with pytest.raises(MaskError, match=r"transition=\(1, 0.5\) needs the tokens' grid.*packed: pass no transition"):
        mask.background(like, (1, 2, 2), (1, 0.5))
    with pytest.raises(MaskError, match=r"reach=0.5 needs the tokens' grid.*packed: pass reach=math.inf"):
        mask.kept(0.0, like, (1, 2, 2))


def test_as_mask_holds_a_still_mask_over_the_frames():
    still = torch.rand(4, 4)
    assert torch.equal(masks.as_mask(still, frames=3)[0, 0, 2], still)
    assert masks.as_mask(torch.rand(3, 4, 4), frames=3).shape == (1, 1, 3, 4, 4)


@pytest.mark.parametrize(
    ("mask", "frames", "says"),
    [
        (torch.ones(4), None, r"shape \(4,\); expected \(H, W\)"),
        (torch.ones(1, 3, 5, 4, 4), None, r"mask\[:, :1\]"),
        (torch.ones(0, 4), None, "is empty"),
        (torch.ones(4, 4, dtype=torch.int64), None, r"torch\.int64.*mask > 0"),
        (torch.ones(4, 4, dtype=torch.uint8), None, r"largest value is 1: pass mask > 0"),
        (torch.full((4, 4), 7, dtype=torch.uint8), None, r"largest value is 7: pass mask > 0"),
        (torch.full((4, 4), 255.0), None, "pass mask / 255"),
        (torch.full((4, 4), -1.0), None, "run from -1 to -1"),
        (torch.tensor([[0.0, float("nan")]]), None, "run from nan"),
        (torch.ones(4, 4, 4), 5, "has 4 frames; expected 5"),
        (torch.ones(5, 1, 4, 4), 5, r"5 frames or 5 clips: pass mask\.transpose\(0, 1\)"),
    ],
)
def test_as_mask_says_what_is_wrong(mask, frames, says):
    with pytest.raises(MaskError, match=says):
        masks.as_mask(mask, frames)


def test_check_mask_refuses_trivial_masks_per_clip():
    good = torch.eye(4)
    assert masks.check_mask(good).shape == (1, 1, 1, 4, 4)
    with pytest.raises(MaskError, match="nothing to edit"):
        masks.check_mask(torch.zeros(4, 4))
    with pytest.raises(MaskError, match=r"is the polarity inverted\? use masks\.from_keep_mask"):
        masks.check_mask(torch.ones(4, 4))
    with pytest.raises(MaskError, match=r"clip 1 \(of 2\) is 0 everywhere"):
        masks.check_mask(torch.stack([good, torch.zeros(4, 4)])[:, None])


# pixels -> latents -> tokens


@quick
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_latent_mask_matches_a_loop(data, temporal, sh, sw):
    groups, height, width = (data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
    frames = 1 + groups * temporal
    pixels = data.draw(
        arrays(np.float32, (frames, height * sh, width * sw), elements=st.sampled_from([0.0, 0.25, 1.0]))
    )
    got = masks.latent_mask(pixels, temporal=temporal, spatial=(sh, sw))
    assert got.shape == (1, 1, 1 + groups, height, width)
    for t in range(1 + groups):
        span = slice(0, 1) if t == 0 else slice(1 + (t - 1) * temporal, t * temporal + 1)
        for i in range(height):
            for j in range(width):
                cell = pixels[span, i * sh : (i + 1) * sh, j * sw : (j + 1) * sw]
                assert got[0, 0, t, i, j] == cell.max()


@quick
@given(clips())
def test_latent_mask_without_compression_is_the_identity(pixels):
    assert torch.equal(masks.latent_mask(pixels, temporal=1, spatial=1), masks.as_mask(pixels))


def test_a_moving_object_reaches_only_its_own_latent_frame():
    pixels = torch.zeros(9, 16, 16)
    pixels[5, 9, 3] = 1  # frames 5..8 make latent frame 2
    assert masks.latent_mask(pixels).nonzero().tolist() == [[0, 0, 2, 1, 0]]


@quick
@given(st.data(), st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)))
def test_an_edited_cell_makes_its_token_edited_and_no_other(data, patch):
    grid = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    shape = tuple(g * p for g, p in zip(grid, patch, strict=True))
    t, i, j = (data.draw(st.integers(0, n - 1)) for n in shape)
    latent = torch.zeros(shape)
    latent[t, i, j] = 0.01
    tokens = masks.token_mask(latent, patch)
    assert tokens.shape == (1, grid[0] * grid[1] * grid[2])
    assert tokens.dtype == torch.bool
    expected = (t // patch[0] * grid[1] + i // patch[1]) * grid[2] + j // patch[2]
    assert tokens[0].nonzero().flatten().tolist() == [expected]


def test_latent_and_token_masks_treat_clips_separately():
    batch = (torch.rand(3, 1, 9, 16, 32) > 0.99).float()
    together = masks.token_mask(masks.latent_mask(batch))
    apart = [masks.token_mask(masks.latent_mask(clip[None])) for clip in batch]
    assert torch.equal(together, torch.cat(apart))


def test_pooling_errors_name_what_would_fit():
    with pytest.raises(MaskError, match=r"10 frames .* 1 \+ 4k frames, here 9 or 13.*mask\[:, :, :9\]"):
        masks.latent_mask(torch.ones(10, 16, 16))
    with pytest.raises(
        MaskError, match=r"\(9, 20, 33\): resize with masks\.resize\(mask, 9, 16, 32\).*\(9, 24, 40\)"
    ) as e:
        masks.latent_mask(torch.ones(9, 20, 33), temporal=1)
    assert "spatial" in str(e.value)
    with pytest.raises(MaskError, match=r"patch=\(1, 2, 2\) does not divide .* \(3, 5, 4\)"):
        masks.token_mask(torch.ones(3, 5, 4))
    with pytest.raises(MaskError, match="whole number >= 1"):
        masks.latent_mask(torch.ones(1, 8, 8), spatial=0)
    with pytest.raises(MaskError, match="expected latents per token"):
        masks.token_mask(torch.ones(1, 8, 8), patch=(1, 0, 2))


@quick
@given(clips(), st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)))
def test_resize_never_loses_a_region_and_never_makes_one_up(mask, size):
    resized = masks.resize(mask, *size)
    assert resized.shape == (1, 1, *size)
    assert resized.max() == mask.max()
    assert torch.equal(masks.resize(mask, *mask.shape), masks.as_mask(mask))
    doubled = masks.resize(mask, *(2 * n for n in mask.shape))
    assert torch.equal(doubled[0, 0, ::2, ::2, ::2], mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pooling_in_every_dtype(dtype):
    mask = torch.eye(8, dtype=dtype)[None]
    for pooled in (masks.resize(mask, 1, 4, 4), masks.latent_mask(mask, spatial=2)):
        assert pooled.dtype == dtype
        assert torch.equal(pooled[0, 0], torch.eye(4, dtype=dtype)[None])


def test_resize_keeps_one_pixel_of_a_large_frame():
    mask = torch.zeros(49, 480, 832)
    mask[17, 301, 555] = 1
    assert masks.resize(mask, 5, 6, 7).sum() == 1
    with pytest.raises(MaskError, match="whole number >= 1"):
        masks.resize(mask, 0, 4, 4)


# morphology


@quick
@given(clips(), st.sampled_from([0, 1, 1.5, 3]), st.sampled_from([0, 1, 2]))
def test_morphology_laws(mask, radius, more):
    hard = masks.as_mask(mask)
    grown, shrunk = masks.grow(mask, radius), 1 - masks.grow(1 - mask, radius)
    assert (shrunk <= hard).all()
    assert (hard <= grown).all()
    assert (grown <= masks.grow(mask, radius + more)).all()
    assert torch.equal(masks.grow(mask, 0), hard)
    soft = masks.feather(mask, radius)
    assert torch.equal(soft == 1, hard == 1)
    assert (soft[grown == 0] == 0).all()
    assert ((soft >= 0) & (soft <= 1)).all()


def test_grow_is_a_disc_within_its_own_frame():
    mask = torch.zeros(3, 9, 9)
    mask[1, 4, 4] = 1
    grown = masks.grow(mask, 2)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    assert torch.equal(grown[1], ((rows - 4) ** 2 + (columns - 4) ** 2 <= 4).float())
    assert grown[[0, 2]].sum() == 0


def test_feather_falls_smoothly_to_zero():
    mask = torch.zeros(1, 20)
    mask[0, 0] = 1
    ramp = masks.feather(mask, 8).flatten()
    assert torch.allclose(ramp[:9], (1 + torch.cos(torch.pi * torch.arange(9) / 8)) / 2, atol=1e-6)
    assert (ramp.diff() <= 0).all()
    assert ramp[8:].abs().max() < 1e-6


def test_morphology_keeps_dtype_and_refuses_negative_radii():
    assert masks.feather(torch.eye(4, dtype=torch.float64), 2).dtype == torch.float64
    with pytest.raises(MaskError, match=r"radius=-1; .* 1 - masks\.grow\(1 - mask"):
        masks.grow(torch.eye(4), -1)


# other people's conventions


def test_from_keep_mask_turns_the_polarity():
    keep = torch.tensor([[1.0, 0.0, 0.25]])
    assert masks.from_keep_mask(keep, frames=2)[0, 0, 1].tolist() == [[0.0, 1.0, 0.75]]


def test_from_comfy_reads_images_as_frames_and_hardens_soft_borders():
    frames = torch.zeros(5, 1, 4, 4)
    frames[2, 0, 1, 1], frames[3, 0, 1, 1] = 1.0, 0.3
    frames[:, 0, 2:] = 5 / 255  # what compression leaves on black
    video = masks.from_comfy(frames, frames=5)
    assert video.shape == (1, 1, 5, 4, 4)
    assert video[0, 0, :, 1, 1].tolist() == [0, 0, 1, 1, 0]
    assert video.sum() == 2
    assert torch.equal(masks.from_comfy(frames[:, 0]), video)
    assert torch.equal(masks.from_comfy(frames.transpose(0, 1)[None]), video)


def test_from_diffusers_reads_pil_arrays_and_lists():
    array = np.zeros((6, 8), np.uint8)
    array[1:3, 2:5], array[4, 4] = 255, 100
    expected = masks.as_mask(torch.from_numpy(array) > 127)
    image = Image.fromarray(array)
    for same in (image, image.convert("RGB"), array, np.stack([array] * 3, -1), array / 255.0, torch.from_numpy(array)):
        assert torch.equal(masks.from_diffusers(same).float(), expected)
    video = [image, array, np.stack([array] * 3, -1)]
    assert torch.equal(masks.from_diffusers(video), expected.expand(-1, -1, 3, -1, -1))
    assert masks.from_diffusers(image, frames=9).shape == (1, 1, 9, 6, 8)
    pages = [image.convert("1"), image.point(lambda level: 255 * (level > 127))]  # of two modes
    assert torch.equal(masks.from_diffusers(pages), expected.expand(-1, -1, 2, -1, -1))
    assert torch.equal(masks.as_mask(pages), masks.from_diffusers(pages))
    with pytest.raises(MaskError, match="empty list"):
        masks.from_diffusers([])
    with pytest.raises(MaskError, match="expected one size"):
        masks.from_diffusers([array, array[:3]])


def test_from_diffusers_takes_every_painted_colour():
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[0, 0], colours[1, 1], colours[2, 2], colours[3, 3] = (255, 0, 0), (0, 0, 255), (0, 200, 0), (90, 0, 90)
    image = Image.fromarray(colours)
    expected = torch.diag(torch.tensor([1.0, 1, 1, 0]))[None, None, None]
    for same in (image, image.convert("P", palette=Image.Palette.ADAPTIVE), colours, [image], image.convert("RGBA")):
        assert torch.equal(masks.from_diffusers(same).float(), expected)
    assert masks.from_diffusers(Image.fromarray(colours[..., 0] > 0)).sum() == 2
    with pytest.raises(MaskError, match="dtype"):
        masks.from_diffusers(Image.fromarray(np.full((4, 4), 300, np.int32)))  # of an unknown range


def test_a_mask_of_bytes_for_packed_latents_is_no_weight_of_255():
    mask = torch.tensor([0, 3, 255, 0], dtype=torch.uint8).view(1, 4, 1)
    like = torch.zeros(1, 4, 8)
    assert FittedMask(mask).latent(like).flatten().tolist() == [0, 0, 1, 0]
    assert FittedMask(mask).tokens(like, (1, 1, 1)).flatten().tolist() == [False, False, True, False]


def test_a_palette_of_a_picture_is_its_brightest_channel():
    page = np.zeros((8, 8, 3), np.uint8)
    page[2:5, 3:6] = 255
    page[6, 1:3, 0] = 255  # red is white, as in read_mask
    picture = Image.fromarray(page).quantize(3)
    assert picture.mode == "P"
    assert torch.equal(masks.as_mask(picture), masks.as_mask(page.max(-1)))
    backwards = Image.fromarray(255 - page.max(-1), "P")  # the darkest colour has the largest index
    backwards.putpalette([255 - i // 3 for i in range(768)])
    for pages in ([picture] * 3, (picture, backwards, Image.fromarray(page.max(-1)))):
        assert torch.equal(masks.as_mask(pages), masks.as_mask(page.max(-1), frames=3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_picture_of_any_mode_is_one_frame(mode):
    page = np.zeros((6, 8), np.uint8)
    page[1:3, 2:5] = 255
    picture = Image.fromarray(page).convert(mode)
    expected = torch.from_numpy(page > 0).float()[None, None, None]
    assert torch.equal(masks.as_mask(picture), expected)
    assert torch.equal(masks.as_mask([picture, picture]), expected.expand(-1, -1, 2, -1, -1))


def test_a_mask_with_a_gradient_is_a_mask():
    given = torch.zeros(1, 1, 8, 8).index_fill(3, torch.tensor([3]), 1.0).requires_grad_()
    assert torch.equal(masks.grow(given, 1), masks.grow(given.detach(), 1))
    assert not masks.as_mask(given).requires_grad


@pytest.mark.parametrize(
    ("frames", "side", "speed"),
    [
        (33, 64, "twice"),
        (33, 128, "twice"),
        (33, 256, None),  # LTX
        (25, 64, "1.5 times"),
        (17, 64, None),
        (9, 64, "half"),
        (17, 256, "half"),
        (1, 64, None),
        (5, 64, None),
    ],
)
def test_a_mask_of_another_length_than_the_clips_is_told(frames, side, speed):
    mask, like = torch.zeros(1, 1, frames, side, side), torch.zeros(1, 4, 5, 8, 8)
    mask[..., : side // 2] = 1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fitted = FittedMask(mask).latent(like)
    told = [str(each.message) for each in seen]
    assert [f"runs at {speed} its speed" in each for each in told] == [True] * (speed is not None)
    for each in told:
        said = eval(each.rpartition("mask=")[2].rstrip("."), {"kv": kv, "mask": mask})
        assert torch.equal(FittedMask(said).latent(like), fitted)


@pytest.mark.parametrize(("frames", "side"), [(49, 64), (13, 64), (21, 64), (17, 8), (9, 8)])
def test_a_mask_of_a_length_that_no_vae_makes_is_refused(frames, side):
    mask = torch.zeros(1, 1, frames, side, side)
    mask[..., : side // 2] = 1
    with pytest.raises(MaskError, match="no whole compression factor"):
        FittedMask(mask).latent(torch.zeros(1, 4, 5, 8, 8))


def test_noise_of_a_mask_is_not_edited_in_whatever_form():
    painted = torch.zeros(1, 1, 2, 16, 16, dtype=torch.uint8)
    painted[..., :8, :8] = 255
    noisy = painted.clone()
    noisy[..., ::3, ::5].clamp_(min=3)
    wanted = FittedMask(masks.as_mask(painted)).tokens(torch.zeros(1, 4, 2, 16, 16), (1, 4, 4))
    for mask in (masks.as_mask(noisy), noisy / 255, (noisy / 255).half()):
        assert torch.equal(FittedMask(mask).tokens(torch.zeros(1, 4, 2, 16, 16), (1, 4, 4)), wanted)
    with pytest.raises(MaskError, match="0 everywhere"):
        masks.check_mask(torch.full((8, 8), 0.05))


def test_hints_lead_to_a_mask():
    """What a message says to do gives the mask that was meant."""
    moving = torch.zeros(10, 64, 96)
    moving[:, 8:24] = 1
    with pytest.raises(MaskError, match=r"take mask.transpose\(1, 2\)"):
        masks.as_mask(moving[None, :, None])  # frames before channels
    assert torch.equal(masks.as_mask(moving[None, :, None].transpose(1, 2)), masks.as_mask(moving))
    with pytest.raises(MaskError, match=r"of as_mask\(mask\), mask\[:, :, :9\]"):
        masks.latent_mask(moving, temporal=4)
    assert masks.latent_mask(masks.as_mask(moving)[:, :, :9], temporal=4).shape == (1, 1, 3, 8, 12)
    picture = moving[0, :, :, None].expand(-1, -1, 3)
    with pytest.raises(MaskError, match=r"Try mask\[..., 0\] or masks.from_diffusers\(mask\)"):
        masks.as_mask(picture, frames=9)
    for found in (masks.as_mask(picture[..., 0], frames=9), masks.from_diffusers(picture.numpy(), frames=9)):
        assert torch.equal(found, masks.as_mask(moving[0], frames=9))


def test_a_mask_whose_time_is_last_is_asked_about_its_axes():
    given = torch.zeros(9, 64, 64)
    given[:, 16:32, 16:32] = 1
    like = torch.zeros(1, 4, 3, 8, 8)
    for turned in (given.permute(1, 2, 0), given[:, :, :48].permute(1, 2, 0)):
        with pytest.raises(MaskError, match=r"Are its axes time, height, width\? mask\.permute\(2, 0, 1\)"):
            FittedMask(turned).latent(like)
    assert torch.equal(FittedMask(given.permute(1, 2, 0).permute(2, 0, 1)).latent(like), FittedMask(given).latent(like))
    with pytest.raises(MaskError, match=r"one for both sides\.\n  Pass the mask"):
        FittedMask(given[:8]).latent(like)
