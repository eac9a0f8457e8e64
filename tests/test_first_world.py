"""The judge says exactly the truth on renders, stays right under noise and blur, and calls broken objects broken."""

import math
import random
from dataclasses import replace
from pathlib import Path

import first_world
import pytest
import torch
from first_world.judge import CLEAN, JudgeError, Verdict, attribute_accuracy, judge
from first_world.world import (
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZE,
    Scene,
    background,
    centre,
    coverage,
    edit_mask,
    render,
    sample_edit,
    sample_scene,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from world.compare import compare, make_task
from world.sheet import sample_sheet

from kvlock_sampling.types import KVLockError
from kvlock_sampling.video import VideoError

SCENES = [sample_scene(seed) for seed in range(200)]
SOME = [sample_scene(seed, empty=0.0) for seed in range(24)]
PIXELS = torch.arange(SIZE) + 0.5


def right(verdict: Verdict, scene: Scene) -> bool:
    colour, motion = (scene.colour, scene.motion) if scene.shape else ("", None)
    return (verdict.colour, verdict.shape, verdict.motion) == (colour, scene.shape, motion)


def blurred(clips: Tensor) -> Tensor:
    return F.avg_pool3d(F.pad(clips, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), 1)


def noise(clips: Tensor) -> Tensor:
    return 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))


def painted(scene: Scene, alpha: Tensor, colour: str | None = None) -> Tensor:
    """The scene's background with its colour at coverage alpha (T, H, W)."""
    paint = torch.tensor(COLOURS[colour or scene.colour]).view(3, 1, 1, 1)
    return (background(scene) * (1 - alpha) + paint * alpha) * 2 - 1


def left_half(scene: Scene) -> Tensor:
    return (centre(scene)[:, 0].view(-1, 1, 1) > PIXELS).expand(-1, SIZE, -1)


def top_half(scene: Scene) -> Tensor:
    return (centre(scene)[:, 1].view(-1, 1, 1) > PIXELS[:, None]).expand(-1, -1, SIZE)


def test_the_truth_on_200_scenes() -> None:
    for shape in (*SHAPES, None):
        assert sum(scene.shape == shape for scene in SCENES) > 10
    verdicts = judge(render(SCENES))
    for verdict, scene in zip(verdicts, SCENES, strict=True):
        assert right(verdict, scene)
        assert verdict.quality > 0.999
        assert verdict.frame_quality.min() > 0.999
        assert verdict.error < 1e-6
        if scene.shape is None:
            assert verdict.radius == 0
            assert verdict.centre.isnan().all()
        else:
            assert (verdict.centre - centre(scene)).abs().max() < 1e-3
            assert abs(verdict.radius - scene.radius) < 1e-3
            assert verdict.margin > 0.05
            assert verdict.softness < 0.01


@pytest.mark.parametrize("spoil", ["noise", "blur", "both"])
def test_right_and_clean_under_noise_and_blur(spoil: str) -> None:
    scenes = SCENES[:50]
    clips = render(scenes)
    clips = clips if spoil == "noise" else blurred(clips)
    clips = clips if spoil == "blur" else clips + noise(clips)
    for verdict, scene in zip(judge(clips), scenes, strict=True):
        assert right(verdict, scene)
        assert verdict.clean
        if spoil == "blur" and scene.shape is not None:
            assert verdict.softness > 0.9


@pytest.mark.parametrize("half", [left_half, top_half])
@pytest.mark.parametrize("pair", [(a, b) for a in SHAPES for b in SHAPES if a < b])
def test_half_and_half_is_broken(pair: tuple[str, str], half: object) -> None:
    clips = []
    for scene in SOME[:8]:
        one, other = coverage(scene.reshape(pair[0])), coverage(scene.reshape(pair[1]))
        clips.append(painted(scene, torch.where(half(scene), one, other)))  # type: ignore[operator]
    assert max(verdict.quality for verdict in judge(torch.stack(clips))) < CLEAN


def test_other_corruptions_are_broken() -> None:
    broken: dict[str, list[Tensor]] = {}
    for scene in SOME:
        cover, where = coverage(scene), centre(scene)
        other = random.Random(scene.x).choice([name for name in COLOURS if name != scene.colour])
        whole, recoloured = render([scene, scene.recolour(other)])
        dot = (PIXELS - 2.5).abs()[:, None].maximum((PIXELS - 2.5).abs()) < 2
        hole = (PIXELS - where[:, 0].view(-1, 1, 1)).hypot(PIXELS[:, None] - where[:, 1].view(-1, 1, 1)) < 1.8
        mirrored = painted(scene, cover.maximum(cover.flip(1, 2)))
        grey = torch.where(hole, -torch.ones(()), whole)
        broken.setdefault("faded", []).append(painted(scene, 0.7 * cover))
        broken.setdefault("ghost", []).append(painted(scene, 0.3 * cover))
        broken.setdefault("stray dot", []).append(
            torch.where(dot, torch.tensor([0.9, -0.8, -0.7]).view(3, 1, 1, 1), whole)
        )
        broken.setdefault("two colours", []).append(torch.where(left_half(scene), whole, recoloured))
        broken.setdefault("black hole", []).append(grey)
        broken.setdefault("gone in a frame", []).append(painted(scene, cover * (torch.arange(8) != 3).view(-1, 1, 1)))
        if (cover * cover.flip(1, 2)).sum() < 1:
            broken.setdefault("two objects", []).append(mirrored)
    for name, clips in broken.items():
        for verdict in judge(torch.stack(clips)):
            assert not verdict.clean, (name, verdict.quality)
            if name == "gone in a frame":
                assert verdict.frame_quality.argmin() == 3
                assert verdict.frame_quality[3] < 0.1
            if name == "ghost":
                assert verdict.shape is None


def test_region_hides_what_is_outside() -> None:
    scene = replace(SOME[0], x=8.5, y=9.0, motion="still", radius=5.5)
    other = replace(SOME[1], x=23.0, y=22.5, motion="still", radius=5.5)
    alpha = coverage(other).unsqueeze(0)
    both = render([scene])[0] * (1 - alpha) + (torch.tensor(COLOURS[other.colour]).view(3, 1, 1, 1) * 2 - 1) * alpha
    for one in (scene, other):
        verdict = judge(both[None], edit_mask(one, one)[None])[0]
        assert right(verdict, one)
        assert verdict.quality > 0.99
    assert not judge(both[None])[0].clean
    removed = judge(render([scene.remove()]), edit_mask(scene, scene)[None])[0]
    assert (removed.shape, removed.clean) == (None, True)


def test_attribute_accuracy_counts() -> None:
    scenes = [*SOME[:5], SOME[5].remove()]
    shown = [
        scenes[0],
        scenes[1].recolour(next(name for name in COLOURS if name != scenes[1].colour)),
        scenes[2].reshape(next(name for name in SHAPES if name != scenes[2].shape)),
        scenes[3].remove(),
        scenes[4],
        SOME[5].remove(),
    ]
    rates = attribute_accuracy(render(shown), scenes)
    assert rates == pytest.approx({"colour": 3 / 5, "shape": 4 / 6, "both": 3 / 6, "motion": 4 / 5, "clean": 3 / 6})
    assert math.isnan(attribute_accuracy(render(shown[-1:]), scenes[-1:])["colour"])


def test_motion_word_needs_no_exact_speed() -> None:
    for scene in SOME[:10]:
        verdict = judge(render([scene]))[0]
        drift = verdict._replace(centre=verdict.centre * torch.tensor([1.2, 1.2]))
        assert (verdict.motion, drift.motion) == (scene.motion, scene.motion)
        assert scene.motion in MOTIONS


def test_errors() -> None:
    clips = render(SOME[:2])
    with pytest.raises(JudgeError, match=r"judge\(clip\[None\]\)"):
        judge(clips[0])
    with pytest.raises(JudgeError, match="nan or inf"):
        judge(clips * torch.nan)
    source, target = sample_edit(0, "replace")
    with pytest.raises(JudgeError, match=r"judge\(clips, mask\[None\]\)"):
        judge(clips, edit_mask(source, target))
    with pytest.raises(JudgeError, match="2 clips and 1 scenes"):
        attribute_accuracy(clips, SOME[:1])


def test_sample_sheet(tmp_path: Path) -> None:
    captions = [scene.prompt for scene in SOME[:6]]
    sample_sheet(render(SOME[:6]), captions, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * (256 + 8) + 8, 2 * (64 + 22 + 8) + 8)
    with pytest.raises(VideoError, match="label"):
        sample_sheet(render(SOME[:6]), captions[:2], tmp_path / "sheet.png")
    with pytest.raises(VideoError, match=r"frames=\(0, -1\)"):
        sample_sheet(render(SOME[:6]), captions, tmp_path / "sheet.png", frames=(0, 8))
    with pytest.raises(VideoError, match=r"\.png"):
        sample_sheet(render(SOME[:6]), captions, tmp_path / "sheet.mp4")


def test_its_model_edits_as_the_embedded_one_does() -> None:
    video = first_world.load()
    pairs = [first_world.sample_edit(seed, kind) for seed, kind in enumerate(first_world.EDITS)]
    task = make_task(pairs, first_world.FIRST_WORLD)
    edit, scored = compare(task, video, {"full": {"policy": "full"}}, steps=2)["full"]
    assert edit.pixels.shape == (5, 3, 8, 32, 32)
    assert scored.background_psnr.tolist() == [100] * 5
    assert (edit.pixels - task.source).abs().amax((1, 2, 3, 4)).min() > 0.1
    with pytest.raises(KVLockError, match="does not know the word 'circel'"):
        video.prompt("a red circel")
