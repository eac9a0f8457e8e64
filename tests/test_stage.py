"""The stage: scenes, their renders, true edits, the regions that are scored, prompts."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from kvlock_sampling.tiny import edit_mask, load, render, sample_edit, sample_scene, tokenize
from kvlock_sampling.tiny.model import WORDS
from kvlock_sampling.tiny.world import (
    COLOURS,
    EDITS,
    EFFECT,
    FLOWERS,
    FRAMES,
    MARGIN,
    MOTIONS,
    SHAPES,
    SIZE,
    SPEED,
    Scene,
    coverage,
    regions,
)
from kvlock_sampling.types import KVLockError

SCENE = Scene(
    colour="red",
    shape="ball",
    motion="standing still",
    glowing=False,
    x=32.0,
    foot=52.0,
    radius=10.0,
    colours=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    patterns=("plain", "plain"),
    frequencies=(0.5, 0.5),
    phases=(0.3, 0.3),
    contrasts=(0.1, 0.1),
    horizon=38.0,
    pan=0.0,
    light="right",
    gradient=0.0,
    post=False,
    post_x=50.0,
    post_foot=50.0,
    post_width=3.0,
    post_height=18.0,
    post_grey=0.8,
)
PINNED = [
    [[-0.139903, 0.831375, -0.625255, 0.785000, 0.031325], [-0.139903, -0.721313, -0.625255, 0.785000, 0.031325]],
    [[-0.124509, 0.840000, -0.143259, 1.000000, 0.200217], [-0.137560, -0.720000, -0.258630, 0.833418, 0.057026]],
]


def brightness(scene):
    return render([scene]).mean(dim=1)[0, 0]  # first frame, (SIZE, SIZE)


def test_clips_are_deterministic_and_bounded() -> None:
    scenes = [sample_scene(seed) for seed in range(32)]
    clips = render(scenes)
    assert clips.shape == (32, 3, FRAMES, SIZE, SIZE)
    assert clips.min() >= -1
    assert clips.max() <= 1
    assert scenes == [sample_scene(seed) for seed in range(32)]
    assert torch.equal(clips, render(scenes))
    assert len({scene.colour for scene in scenes}) == len(COLOURS)
    assert {scene.shape is None for scene in scenes} == {True, False}
    assert {scene.post for scene in scenes} == {True, False}


def test_a_clip_does_not_depend_on_the_batch() -> None:
    scenes = [sample_scene(seed) for seed in range(12)]
    together = render(scenes)
    for i, scene in enumerate(scenes):
        torch.testing.assert_close(render([scene])[0], together[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("ball", math.pi * 9.5**2),
        ("box", 16.8**2),
        ("cross", 4 * 9.8 * 3.4 * 2 - 4 * 3.4**2),
        ("cone", 0.5 * 19.5 * (2 * 19.5 / 1.9)),
        ("flower with four petals", math.pi * 100 * (0.7**2 + 0.3**2 / 2)),
        ("flower with five petals", math.pi * 100 * (0.7**2 + 0.3**2 / 2)),
        ("flower with six petals", math.pi * 100 * (0.7**2 + 0.3**2 / 2)),
    ],
)
def test_alpha_has_the_area_of_the_shape(shape, area) -> None:
    alpha = coverage([replace(SCENE, shape=shape)])
    assert alpha.shape == (1, 1, FRAMES, SIZE, SIZE)
    assert alpha[0, 0, 0].sum() == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("shape", FLOWERS)
def test_a_flower_has_as_many_petals_as_its_name_says(shape) -> None:
    alpha = coverage([replace(SCENE, shape=shape)])[0, 0, 0]
    angle = torch.arange(0, 2 * math.pi, 0.01)
    y, x = (42 + 8 * angle.sin()).long(), (32 + 8 * angle.cos()).long()
    inside = alpha[y, x] > 0.5
    assert int((inside & ~inside.roll(1)).sum()) == FLOWERS[shape]


@pytest.mark.parametrize("motion", MOTIONS)
def test_an_object_moves_at_its_speed_plus_the_pan(motion) -> None:
    alpha = coverage([replace(SCENE, motion=motion, pan=0.5)])[0, 0]
    x = (alpha.sum(1) * (torch.arange(SIZE) + 0.5)).sum(1) / alpha.sum((1, 2))
    speed = (x[-1] - x[0]) / (FRAMES - 1)
    assert speed == pytest.approx(0.5 + SPEED * MOTIONS[motion], abs=0.02)
    assert (x[0] + x[-1]) / 2 == pytest.approx(32, abs=0.05)


def test_the_object_has_its_colour() -> None:
    clip = render([replace(SCENE, colour="cyan")])[0, :, :, 42, 32]
    torch.testing.assert_close(
        (clip + 1) / 2, torch.tensor(COLOURS["cyan"]).view(3, 1).expand(3, FRAMES), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("light", ["left", "right"])
def test_a_matte_object_casts_a_shadow_away_from_the_light(light) -> None:
    change = brightness(replace(SCENE, light=light)) - brightness(replace(SCENE, light=light, shape=None))
    left, right = change[50, :18].sum(), change[50, 46:].sum()
    dark, lit = (left, right) if light == "right" else (right, left)
    assert dark < -1
    assert lit == 0
    assert change[:30].abs().max() == 0  # a shadow lies on the floor


def test_a_glowing_object_tints_what_is_near_and_casts_no_shadow() -> None:
    glowing = replace(SCENE, glowing=True, colour="blue")
    change = (render([glowing]) - render([replace(glowing, shape=None)]))[0, :, 0]
    assert change[2, 42, 48] > 0.05  # blue, beside the ball
    assert change[2, 42, 48] > 2 * change[0, 42, 48]
    assert change[2, 42, 48] > 4 * change[2, 42, 62]
    assert change[:, 50, :18].min() >= 0


def test_the_light_brightens_its_side() -> None:
    lit = brightness(replace(SCENE, shape=None, gradient=0.1))
    assert lit[10, 60] > lit[10, 32] > lit[10, 4]


def test_the_wall_moves_with_the_camera() -> None:
    clip = render([replace(SCENE, shape=None, patterns=("stripes", "plain"), pan=1.0)])[0, :, :, 10]
    torch.testing.assert_close(clip[:, 3, 3:], clip[:, 0, :-3], atol=1e-4, rtol=0)


def test_a_post_stands_and_casts_a_shadow() -> None:
    change = brightness(replace(SCENE, shape=None, post=True)) - brightness(replace(SCENE, shape=None))
    assert change[40, 49] == pytest.approx(2 * (0.8 - 0.5), abs=1e-5)
    assert change[51, 40:46].min() < -0.2
    assert change[:31].abs().max() == 0


def test_pixels_of_a_scene_are_pinned() -> None:
    """The weights were trained on these pixels."""
    flower = replace(SCENE, shape="flower with five petals", motion="moving left")
    scene = replace(flower, pan=0.5, patterns=("stripes", "checks"), gradient=0.1, post=True)
    clip = render([scene, replace(scene, glowing=True)])[:, :, 3]
    places = [(10, 20), (45, 30), (53, 15), (40, 50), (45, 12)]
    found = torch.stack([clip[:, :2, y, x] for y, x in places], dim=-1)
    torch.testing.assert_close(found, torch.tensor(PINNED), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_what_its_name_says(kind) -> None:
    changed = {
        "recolour": {"colour"},
        "reshape": {"colour", "shape"},
        "glow": {"colour", "glowing"},
        "remove": {"shape"},
        "insert": {"shape"},
    }
    for seed in range(20):
        source, target = sample_edit(seed, kind)
        assert (source, target) == sample_edit(seed, kind)
        before, after = asdict(source), asdict(target)
        assert {field for field in before if before[field] != after[field]} == changed[kind]
        assert (source.shape is None) == (kind == "insert")
        assert (target.shape is None) == (kind == "remove")


def test_the_mask_is_both_outlines_grown_by_the_margin() -> None:
    source, target = SCENE, replace(SCENE, x=40.0, shape="box")
    alpha = torch.maximum(*(coverage([scene])[0, 0, 0] for scene in (source, target)))
    rows, columns = torch.nonzero(alpha > 0.02, as_tuple=True)
    mask = edit_mask([source], [target])
    assert mask.shape == (1, 1, FRAMES, SIZE, SIZE)
    mask_rows, mask_columns = torch.nonzero(mask[0, 0, 0], as_tuple=True)
    assert (mask_rows.min(), mask_rows.max()) == (rows.min() - MARGIN, rows.max() + MARGIN)
    assert (mask_columns.min(), mask_columns.max()) == (columns.min() - MARGIN, columns.max() + MARGIN)


@pytest.mark.parametrize("kind", EDITS)
def test_regions_divide_the_frame(kind) -> None:
    pairs = [sample_edit(seed, kind) for seed in range(8)]
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    mask, effect, rest = regions(sources, targets)
    assert torch.equal(mask + effect + rest, torch.ones_like(mask))
    assert {0.0, 1.0} == set(torch.stack([mask, effect, rest]).unique().tolist())
    change = (render(targets) - render(sources)).abs().amax(1, keepdim=True)
    assert (change * rest).max() <= EFFECT
    assert change[effect.bool()].numel() == 0 or change[effect.bool()].min() > EFFECT
    if kind in ("glow", "remove", "insert"):
        assert effect.mean() > 0.01  # shadow or glow


def test_recolouring_a_matte_object_has_no_effect_region() -> None:
    mask, effect, _ = regions([SCENE], [replace(SCENE, colour="blue")])
    assert mask.any()
    assert not effect.any()


def test_old_words_keep_their_rows() -> None:
    assert WORDS[:7] == ("", *COLOURS)
    assert WORDS[7:14] == SHAPES
    assert WORDS[14:17] == ("standing still", "moving left", "moving right")
    assert WORDS[17:] == ("matte", "glowing", "an empty stage", "with a post", "without a post")


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("", [0, 0, 0, 0, 0]),
        ("an empty stage", [19, 19, 19, 19, 21]),
        ("An empty stage, with a post.", [19, 19, 19, 19, 20]),
        ("a red flower with five petals moving left, glowing, beside a post", [1, 12, 15, 18, 20]),
        ("a cyan box standing still, matte, without a post", [6, 8, 14, 17, 21]),
        ("a cyan box", [6, 8, 14, 17, 21]),
    ],
)
def test_prompts_have_words(prompt, rows) -> None:
    assert tokenize(prompt).tolist() == [rows]


def test_a_scene_can_be_read_from_its_prompt() -> None:
    scenes = [sample_scene(seed) for seed in range(100)]
    for scene, rows in zip(scenes, tokenize([scene.prompt for scene in scenes]).tolist(), strict=True):
        words = [WORDS[row] for row in rows]
        assert words[4] == ("with a post" if scene.post else "without a post")
        if scene.shape is None:
            assert words[:4] == ["an empty stage"] * 4
        else:
            assert words[:4] == [scene.colour, scene.shape, scene.motion, "glowing" if scene.glowing else "matte"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red circle", "names none of ball, box"),
        ("a ball moving left", "names none of red, green"),
        ("a red ball glowin", "Did you mean 'glowing'"),
        ("an empty stage, glowing", "cannot read 'glowing'"),
        ("a red blue ball", "cannot read 'blue'"),
    ],
)
def test_prompts_that_cannot_be_read_raise(prompt, message) -> None:
    with pytest.raises(KVLockError, match=message) as caught:
        tokenize(prompt)
    assert 'Try "a red ball moving left' in str(caught.value)


def test_unknown_names_raise() -> None:
    with pytest.raises(ValueError, match=r"'purple'.*'red'"):
        replace(SCENE, colour="purple")
    with pytest.raises(ValueError, match=r"'flower'.*'flower with five petals'"):
        replace(SCENE, shape="flower")
    with pytest.raises(ValueError, match=r"'paint'.*recolour"):
        sample_edit(0, "paint")


def test_clips_are_encoded_on_the_models_device() -> None:
    clip = torch.zeros(1, 3, 8, 64, 64)
    assert load(device="meta").encode(clip).is_meta
    encoded = load().encode(clip)
    assert torch.equal(encoded, clip)
    assert encoded.data_ptr() != clip.data_ptr()
