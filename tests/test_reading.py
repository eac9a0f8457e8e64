"""A clip and its mask are read as one: what is on screen when, where it was painted, and nothing left out unsaid."""

import math
import os
import struct
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFilter, ImageOps

from kvlock_sampling.app import read_pair
from kvlock_sampling.types import KVLockError
from kvlock_sampling.video import VideoError, media, read, read_clip, read_mask, write_clip

ANY = SimpleNamespace(frames=None, size=None, fit=lambda *sides: sides)  # a model that edits any clip


def film(
    path: Path,
    frames: Sequence[np.ndarray],
    fps: float = 10,
    *,
    times: Sequence[float] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    **context: Any,
) -> Path:
    """Frames (height, width, 3 or 4) as a film; `times` of each frame in seconds."""
    with av.open(str(path), "w") as container:
        container.metadata.update(tags or {})
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.metadata.update(tags or {})
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def ramp(count: int, height: int = 24, width: int = 32) -> list[np.ndarray]:
    """Frames of one grey each, so that a frame tells its own index: 10 * index."""
    return [np.full((height, width, 3), 10 * i, np.uint8) for i in range(count)]


def indices(pixels: torch.Tensor) -> list[int]:
    return [round(float(level)) for level in (pixels.mean((0, 2, 3)) + 1) * 12.75]


def bars(count: int, columns: int = 16) -> list[np.ndarray]:
    """Frames (16, 8 * columns) with a white bar that moves 8 pixels a frame."""
    frames = [np.zeros((16, 8 * columns, 3), np.uint8) for _ in range(count)]
    for index, frame in enumerate(frames):
        frame[:, 8 * index : 8 * index + 8] = 255
    return frames


def places(mask: torch.Tensor) -> list[int]:
    """The index that each frame of `bars` shows."""
    return [int(frame.amax(0).nonzero().min()) // 8 for frame in mask[0]]


def save(path: Path, pages: Sequence[np.ndarray], durations: int | list[int], **options: Any) -> Path:
    images = [Image.fromarray(page) for page in pages]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **options)
    return path


def grey(count: int, height: int = 16, width: int = 128) -> list[np.ndarray]:
    return [np.full((height, width, 3), 50, np.uint8)] * count


EVEN = np.arange(12) / 10
AT_7 = np.arange(12) == 7
CLOCKS = {
    "late by nearly half a frame": (EVEN + 0.045 * AT_7, list(range(12))),
    "late by more": (EVEN + 0.07 * AT_7, list(range(12))),
    "early": (EVEN - 0.045 * AT_7, list(range(12))),
    "one dropped": (EVEN + 0.1 * (np.arange(12) > 7), [*range(8), 7, *range(8, 12)]),
    "two dropped": (
        EVEN + 0.1 * (np.arange(12) > 2) + 0.1 * (np.arange(12) > 8),
        [0, 1, 2, 2, *range(3, 9), 8, 9, 10, 11],
    ),
    "variable": (
        np.cumsum([0, 1, 3, 1, 1, 4, 1, 1, 2, 1, 1, 1]) / 10,
        [0, 1, 1, 1, 2, 3, *[4] * 4, 5, 6, 7, 7, 8, 9, 10, 11],
    ),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", CLOCKS)
def test_a_frame_is_shown_when_its_time_stamp_says(tmp_path: Path, name: str, suffix: str) -> None:
    times, wanted = CLOCKS[name]
    clip = read_clip(film(tmp_path / f"clip{suffix}", ramp(12), times=list(times)))
    assert indices(clip.pixels) == wanted
    assert clip.fps == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4"])
def test_a_frame_that_an_avi_left_out_is_held(tmp_path: Path, codec: str) -> None:
    kept = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    with av.open(str(tmp_path / "clip.avi"), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in kept:
            frame = av.VideoFrame.from_ndarray(ramp(12)[index], format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read_clip(tmp_path / "clip.avi")
    assert (indices(clip.pixels), clip.fps) == ([0, 1, 2, 3, 3, 3, 3, 7, 8, 9, 10, 11], 10)


UNEVEN = {  # seconds that the first and the last of 60 frames last, of 1 / 30
    "a long first frame": (0.05, 0.033),
    "a short first frame": (0.02, 0.033),
    "a short last frame": (0.033, 0.001),
    "both": (0.045, 0.02),
}


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("jitter", [0, 0.001])
def test_an_uneven_first_or_last_frame_doubles_no_others(kind: str, jitter: float) -> None:
    first, last = UNEVEN[kind]
    begins = np.concatenate([[0.0], first + np.arange(59) / 30])
    begins[1:] += jitter * np.random.default_rng(0).uniform(-1, 1, 59)
    assert read._beats(np.append(begins, begins[-1] + last)) == 60


@pytest.mark.parametrize("missing", [1, 3, 12, 30, 33, 35])
@pytest.mark.parametrize("jitter", [0, 0.004])
def test_one_missing_frame_is_a_gap_wherever_it_is(missing: int, jitter: float) -> None:
    begins = np.delete(np.arange(37) / 10, missing)
    begins[1:] += jitter * np.random.default_rng(0).uniform(-1, 1, 35)
    assert read._beats(np.append(begins, 3.7)) == 37


@pytest.mark.parametrize("lasting", [1.5, 2.5, 3.5, 7.5])
@pytest.mark.parametrize("which", [0, 10, 23])
@pytest.mark.parametrize("fps", [24, 25, 30])
def test_a_pause_of_half_a_frame_doubles_no_others(lasting: float, which: int, fps: int) -> None:
    """As a recorder that paused, two takes joined, or a first or last frame that is longer."""
    spans = np.ones(24) / fps
    spans[which] *= lasting
    assert 24 <= read._beats(np.append(0, np.cumsum(spans))) <= 24 + math.ceil(lasting)


@pytest.mark.parametrize("slow", [24, 25])
def test_a_rate_that_falls_in_the_middle_stays_in_step(slow: int) -> None:
    """As a phone does in low light."""
    begins = np.append(0, np.cumsum(np.repeat([1 / 30, 1 / slow], 300)))
    count = read._beats(begins)
    shown = begins[np.searchsorted(begins, (np.arange(count) + 0.2) * begins[-1] / count, side="right") - 1]
    assert np.abs(shown - np.arange(count) * begins[-1] / count).max() < 0.07


@pytest.mark.parametrize(("height", "matrix"), [(64, (0.299, 0.114)), (720, (0.2126, 0.0722))])
def test_a_film_without_a_matrix_is_read_as_players_do(
    tmp_path: Path, height: int, matrix: tuple[float, float]
) -> None:
    red, green, blue = 200 / 255, 30 / 255, 60 / 255
    of_red, of_blue = matrix
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    planes = [16 + 219 * luma, 128 + 112 * (blue - luma) / (1 - of_blue), 128 + 112 * (red - luma) / (1 - of_red)]
    pages = [np.full(height * 96 // part, round(level)) for level, part in zip(planes, (1, 4, 4), strict=True)]
    image = np.concatenate(pages).astype(np.uint8).reshape(height * 3 // 2, 96)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, 96, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="yuv420p")))
        container.mux(stream.encode())
    found = (read_clip(tmp_path / "clip.mp4").pixels[:, 0, 30, 40] + 1) * 127.5
    torch.testing.assert_close(found, torch.tensor([200.0, 30.0, 60.0]), rtol=0, atol=3)


def display_p3() -> bytes:
    """A colour profile as phones embed it."""

    def numbers(kind: bytes, *values: float) -> bytes:
        return kind + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    name = "Display P3".encode("utf-16-be")
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0)
    curve += numbers(b"", 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)[4:]
    tags = {b"desc": b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(name), 28) + name}
    tags |= {b"cprt": tags[b"desc"], b"wtpt": numbers(b"XYZ ", 0.9642, 1, 0.8249)}
    tags |= {b"rXYZ": numbers(b"XYZ ", 0.51512, 0.2412, -0.00105), b"gXYZ": numbers(b"XYZ ", 0.29198, 0.69225, 0.04189)}
    tags |= {b"bXYZ": numbers(b"XYZ ", 0.1571, 0.06657, 0.78407)} | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = (
        struct.pack(">I4xI", start + len(body), 0x04300000) + b"mntrRGB XYZ " + struct.pack(">6H", 2024, 1, 1, 0, 0, 0)
    )
    head += b"acsp" + bytes(28) + numbers(b"", 0.9642, 1, 0.8249)[4:] + bytes(48)
    return head + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_images_of_another_gamut_are_read_as_they_look(tmp_path: Path, name: str, mode: str) -> None:
    page = Image.fromarray(np.full((16, 16, 3), (200, 60, 60), np.uint8))
    page = page.convert("RGB" if name == "a.jpg" else mode, palette=Image.Palette.ADAPTIVE)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiles = {None: 0, srgb: 0, b"no profile": 0, display_p3(): 1}
    for profile, wide in profiles.items():
        page.save(tmp_path / name, **({} if profile is None else {"icc_profile": profile}))
        found = (read_clip(tmp_path / name).pixels[:, 0, 8, 8] + 1) * 127.5
        wanted = torch.tensor([[200.0, 60.0, 60.0], [217.0, 42.0, 52.0]])[wide]
        torch.testing.assert_close(found, wanted, rtol=0, atol=2)


def test_a_transparent_colour_stays_black_under_a_profile(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 255, 255)).save(
        tmp_path / "a.png", transparency=(255, 255, 255), icc_profile=display_p3()
    )
    assert read_clip(tmp_path / "a.png").pixels.max() == -1


@pytest.mark.parametrize("size", [64, (64,), "64x96", np.array([64, 96]), (0, 64), (6.5, 64)])
def test_a_size_that_is_none_is_no_fault_of_the_file(tmp_path: Path, size: Any) -> None:
    clip = film(tmp_path / "clip.mp4", ramp(4))
    pair = partial(read_pair, ANY, mask=clip)
    for call in (read_clip, partial(read_mask, frames=4), pair):
        with pytest.raises(VideoError, match=r"expected \(height, width\) in pixels"):
            call(clip=clip, size=size) if call is pair else call(clip, size=size)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("~clip.png")
    assert read_clip("~clip.png").pixels.shape == (3, 1, 8, 8)
    film(tmp_path / "clip.mp4", grey(4))
    assert len(read_clip("~/clip.mp4").pixels[0]) == 4
    _, mask = read_pair(ANY, "~/clip.mp4", film(tmp_path / "mask.mp4", bars(4)))
    assert places(mask) == [0, 1, 2, 3]


def test_numbers_of_masks_beside_a_film_are_named(tmp_path: Path) -> None:
    clip = film(tmp_path / "clip.mp4", grey(8))
    masks = folder(tmp_path / "masks", range(3, 8), bars(8)[3:])
    with pytest.warns(UserWarning, match=r"numbers 3 to 7 of .* are not looked at: the clip"):
        read_pair(ANY, clip, masks)


def test_frames_of_an_avi_stay_in_order(tmp_path: Path) -> None:
    later = {"x264-params": "bframes=3:b-adapt=0"}  # frames that refer to later ones
    clip = read_clip(film(tmp_path / "clip.avi", ramp(12, 48, 64), options=later))
    assert (indices(clip.pixels), clip.fps) == (list(range(12)), 10)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_thousand_frames_per_second_are_no_doubles(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name, ramp(20), 1000, times=[i / 1000 for i in range(20)])
    assert indices(read_clip(path).pixels) == list(range(20))


@pytest.mark.parametrize("name", ["clip.mkv", "clip.webm"])
def test_a_film_that_begins_late_is_whole(tmp_path: Path, name: str) -> None:
    codec = {"clip.mkv": "libx264", "clip.webm": "libvpx-vp9"}[name]
    path = film(tmp_path / name, ramp(12), times=[10 + i / 10 for i in range(12)], codec=codec)
    assert indices(read_clip(path).pixels) == list(range(12))


def test_time_stamps_far_apart_make_no_endless_clip(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.mp4", ramp(3), times=[0, 0.02, 2000])
    with pytest.raises(VideoError, match=r"has 3 frames at times that make .* give fps=1"):
        read_clip(path)
    assert read_clip(path, frames=4, fps=0.1).pixels.shape[1] == 4


def test_only_wanted_frames_are_converted_and_none_after_them_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = [], []
    picture, pictures = media._film_picture, media.pictures
    monkeypatch.setattr(media, "_film_picture", lambda *args: made.append(1) or picture(*args))

    def counted(*args: Any) -> Any:
        for item in pictures(*args):
            seen.append(item[0])
            yield item

    monkeypatch.setattr("kvlock_sampling.video.read.pictures", counted)
    model = SimpleNamespace(frames=None, size=None, usual=(5, 24, 32), fit=lambda *sides: sides)
    clip, _ = read_pair(
        model, film(tmp_path / "a.mp4", ramp(25)), film(tmp_path / "m.mp4", [*ramp(25)[13:], *ramp(13)])
    )
    assert indices(clip.pixels) == [0, 1, 2, 3, 4]
    assert "25 frames of 24 x 32 read; 5 edited, the first ones; 20 left out" in clip.note
    assert len(made) == 2 * (1 + 5)  # one to know its size
    assert max(seen) == 4


def test_merged_frames_of_a_gif_come_back(tmp_path: Path) -> None:
    clip = read_clip(save(tmp_path / "a.gif", ramp(5), [40, 40, 120, 40, 80]))
    assert (indices(clip.pixels), clip.fps) == ([0, 1, 2, 2, 2, 3, 4, 4], 25)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
@pytest.mark.parametrize(
    ("count", "fps"), [(5, 30), (11, 30), (24, 30), (29, 40), (31, 16), (7, 12.5), (40, 24000 / 1001)]
)
def test_our_own_clips_come_back_in_frames_and_rate(tmp_path: Path, suffix: str, count: int, fps: float) -> None:
    pixels = -torch.ones(3, count, 16, 32)
    for t in range(count):
        pixels[:, t, 4:12, t // 3] = 1  # moves at every third frame
    path = tmp_path / f"a{suffix}"
    write_clip(path, pixels, fps=fps)
    clip = read_clip(path)
    assert clip.pixels.shape == pixels.shape
    assert clip.fps == pytest.approx(fps, rel=2e-3 if suffix == ".gif" and fps % 0.5 else 1e-6)
    if suffix == ".gif":
        assert torch.equal(clip.pixels, pixels)
        assert Image.open(path).n_frames == count  # for other readers too


def test_a_gif_in_hundredths_of_a_second_doubles_no_frame(tmp_path: Path) -> None:
    clip = read_clip(save(tmp_path / "a.gif", ramp(11), [30, 40, 30] * 3 + [30, 40]))
    assert (indices(clip.pixels), clip.fps) == (list(range(11)), pytest.approx(30, rel=0.02))


def test_a_gif_of_more_than_50_frames_per_second_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="at most 50 frames per second"):
        write_clip(tmp_path / "a.gif", torch.zeros(3, 3, 8, 8), fps=60)
    assert read_clip(tmp_path / "a.gif").fps == 50


@pytest.mark.parametrize("name", ["a.webp", "a.apng", "a.png"])
def test_images_with_frames_last_as_they_say(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name == "a.webp" else {"format": "PNG"}
    clip = read_clip(save(tmp_path / name, ramp(4), [50, 150, 50, 100], **options))
    assert (indices(clip.pixels), clip.fps) == ([0, 1, 1, 1, 2, 3, 3], 20)


def test_the_picture_for_viewers_without_apng_is_no_frame(tmp_path: Path) -> None:
    save(tmp_path / "a.apng", ramp(4), [100, 100, 100], format="PNG", default_image=True)
    assert indices(read_clip(tmp_path / "a.apng").pixels) == [1, 2, 3]


def test_frames_of_ten_milliseconds_last_a_hundred_as_in_browsers(tmp_path: Path) -> None:
    assert read_clip(save(tmp_path / "a.webp", ramp(4), 10, lossless=True)).fps == 10


# the mask in space


def test_a_mask_of_another_aspect_ratio_is_stretched_as_it_was_painted(tmp_path: Path) -> None:
    film(tmp_path / "clip.mp4", grey(3, 96, 160))
    square = np.zeros((64, 64), np.uint8)
    square[16:32, 48:64] = 255  # a quarter down, at the right edge
    Image.fromarray(square).save(tmp_path / "mask.png")
    with pytest.warns(UserWarning, match=r"is 64 x 64, and the clip .* is displayed as 96 x 160: it is stretched"):
        _, mask = read_pair(ANY, tmp_path / "clip.mp4", tmp_path / "mask.png")
    wanted = torch.zeros(1, 3, 96, 160)
    wanted[..., 24:48, 120:160] = 1
    assert torch.equal(mask, wanted)


def test_a_mask_across_the_clip_is_stretched_with_a_warning(tmp_path: Path) -> None:
    """Its left half is the clip's left half, as it would be seen over the clip."""
    film(tmp_path / "clip.mp4", grey(3, 160, 96))
    painted = np.zeros((96, 160), np.uint8)
    painted[:, :80] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    with pytest.warns(UserWarning, match=r"is 96 x 160, .* is displayed as 160 x 96: it is stretched.*turn it as"):
        _, mask = read_pair(ANY, tmp_path / "clip.mp4", tmp_path / "mask.png")
    assert mask[..., :48].all()
    assert not mask[..., 48:].any()


def test_a_mask_that_is_cut_to_its_middle_is_named(tmp_path: Path) -> None:
    Image.new("L", (128, 128), 255).save(tmp_path / "square.png")
    with pytest.warns(UserWarning, match=r"\(128, 128\), is cut to its middle for \(90, 160\); .*read_pair"):
        read_mask(tmp_path / "square.png", frames=2, size=(90, 160))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_mask(tmp_path / "square.png", frames=2, size=(127, 128))
        Image.new("L", (1920, 1080), 255).save(tmp_path / "wide.png")
        read_mask(tmp_path / "wide.png", frames=2, size=(480, 832))


@pytest.mark.parametrize("size", [(96, 160), (48, 80), (191, 320), (478, 798)])
def test_a_mask_of_the_same_frame_is_cut_where_the_clip_is(tmp_path: Path, size: tuple[int, int], recwarn) -> None:
    """White is painted in the clip and in the mask; both are cut to a square, and white must stay on white."""
    painted = np.zeros((96, 160, 3), np.uint8)
    painted[32:64, 48:80] = 255
    film(tmp_path / "clip.mov", [painted] * 2, codec="png", pix_fmt="rgb24")
    Image.fromarray(painted).resize(size[::-1], Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    model = SimpleNamespace(frames=2, size=(48, 48))
    clip, mask = read_pair(model, tmp_path / "clip.mov", tmp_path / "mask.png")
    assert torch.equal(mask[0, :, 17:31, 9:23], torch.ones(2, 14, 14))
    assert mask[0, 0].sum() <= (16 + 2) ** 2  # to a pixel of the smallest mask
    assert (clip.pixels[0][mask[0] == 0] < 0.2).all()
    assert not recwarn.list


def test_pixels_that_are_not_square_and_a_turned_clip_are_as_displayed(tmp_path: Path, recwarn) -> None:
    painted = np.zeros((48, 64, 3), np.uint8)
    painted[:, 32:] = 255
    film(tmp_path / "clip.mp4", [painted] * 2, sample_aspect_ratio=Fraction(3, 2))
    mask = np.zeros((96, 192), np.uint8)  # made on the displayed frame
    mask[:, 96:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    clip, region = read_pair(ANY, tmp_path / "clip.mp4", tmp_path / "mask.png")
    assert clip.pixels.shape == (3, 2, 48, 96)
    assert torch.equal(region[0, 0, :, [0, 47, 48, 95]], torch.tensor([0.0, 0, 1, 1]).expand(48, 4))
    assert ((clip.pixels[0, 0] > 0) == (region[0, 0] > 0)).float().mean() > 0.98
    assert not recwarn.list


# the mask in time

MASKS = {
    "half the rate": (lambda p: film(p / "m.mp4", bars(16)[::2][:4], 4), [0, 0, 2, 2, 4, 4, 6, 6], None),
    "twice the rate": (lambda p: film(p / "m.mp4", bars(16), 16), [1, 3, 5, 7, 9, 11, 13, 15], None),
    "a gif": (lambda p: save(p / "m.gif", bars(8), [120, 130] * 4), list(range(8)), None),
    "a webp": (lambda p: save(p / "m.webp", bars(8), 125, lossless=True), list(range(8)), None),
    "longer": (lambda p: film(p / "m.mp4", bars(14), 8), list(range(8)), "has 14 frames, 1.75 s, .* its end is left"),
    "one frame longer": (lambda p: film(p / "m.mp4", bars(9), 8), list(range(8)), "has 9 frames, .* its end is left"),
    "one frame shorter": (
        lambda p: film(p / "m.mp4", bars(7), 8),
        [0, 1, 2, 3, 4, 5, 6, 6],
        "has 7 frames.*last frame is held",
    ),
    "shorter": (
        lambda p: film(p / "m.mp4", bars(5), 8),
        [0, 1, 2, 3, 4, 4, 4, 4],
        "5 frames, 0.625 s.*last frame is held",
    ),
    "as many at another rate": (lambda p: film(p / "m.mp4", bars(8), 24), list(range(8)), "matched one by one"),
    "as many at half the rate": (lambda p: film(p / "m.mp4", bars(8), 4), list(range(8)), "matched one by one"),
    "as many that begin late": (
        lambda p: film(p / "m.mp4", bars(8), times=[0.25 + i / 8 for i in range(8)]),
        list(range(8)),
        None,
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_moving_mask_is_matched_by_time(tmp_path: Path, name: str) -> None:
    make, wanted, said = MASKS[name]
    clip = film(tmp_path / "clip.mp4", grey(8), 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, mask = read_pair(ANY, clip, make(tmp_path))
    assert places(mask) == wanted
    assert len(told) == (said is not None)
    if said:
        with pytest.warns(UserWarning, match=said):
            read_pair(ANY, clip, make(tmp_path))


def test_images_have_no_times_and_are_matched_one_by_one(tmp_path: Path, recwarn) -> None:
    (tmp_path / "masks").mkdir()
    for index, page in enumerate(bars(8)):
        Image.fromarray(page).save(tmp_path / "masks" / f"{index}.png")
    clip = film(tmp_path / "clip.mp4", grey(8), 30)
    assert places(read_pair(ANY, clip, tmp_path / "masks")[1]) == list(range(8))
    for rate in (30, 3):
        mask = film(tmp_path / "mask.mp4", bars(8), rate)
        assert places(read_pair(ANY, tmp_path / "masks", mask)[1]) == list(range(8))
    assert not recwarn.list
    dropped = [0, 1, 2, 4, 5, 6, 7, 8]
    late = film(tmp_path / "late.mp4", grey(8), times=[t / 10 for t in dropped])
    assert places(read_pair(ANY, late, tmp_path / "masks")[1]) == [
        0,
        1,
        2,
        2,
        3,
        4,
        5,
        6,
        7,
    ]  # each stays with its frame


def test_masks_of_the_frames_that_are_read_are_theirs(tmp_path: Path, recwarn) -> None:
    times = [(i + (i >= 4)) / 30 for i in range(12)]
    clip = film(tmp_path / "clip.mp4", bars(12), 30, times=times)  # a phone dropped one frame
    read = places((read_clip(clip).pixels[:1] > 0).float())
    assert read == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    (tmp_path / "masks").mkdir()
    for number, index in enumerate(read):
        Image.fromarray(bars(12)[index]).save(tmp_path / f"masks/{number:02}.png")
    assert places(read_pair(ANY, clip, tmp_path / "masks")[1]) == read
    wanted = [0, 1, 2, 3, 3, 3, 4, 5, 6, 7]
    pages = [bars(10)[i] for i in wanted]
    frames = folder(tmp_path / "frames", range(10), grey(10))
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True})):  # Pillow merges equal frames
        mask = save(tmp_path / name, pages, 120, **options)
        assert places(read_pair(ANY, frames, mask)[1]) == wanted
    assert not recwarn


@pytest.mark.parametrize(("suffix", "rate"), [(".mkv", 30), (".mkv", 60), (".mp4", 24), (".mp4", 48)])
def test_half_the_rate_is_every_second_frame(tmp_path: Path, suffix: str, rate: int) -> None:
    clip = film(tmp_path / f"clip{suffix}", ramp(24), rate)
    assert indices(read_clip(clip, fps=rate / 2).pixels) == list(range(1, 24, 2))


def test_a_mask_of_twice_the_rate_is_matched_evenly(tmp_path: Path) -> None:
    mask = film(tmp_path / "mask.webm", bars(24, 24), 60, codec="libvpx-vp9")
    clip = film(tmp_path / "clip.mp4", grey(12, 16, 192), 30)
    assert places(read_pair(ANY, clip, mask)[1]) == list(range(1, 24, 2))


def folder(path: Path, names: Sequence[str | int], pages: Sequence[np.ndarray]) -> Path:
    """Images in a folder; a number as a name has four digits."""
    path.mkdir()
    for name, page in zip(names, pages, strict=True):
        Image.fromarray(page).save(path / (name if isinstance(name, str) else f"{name:04}.png"))
    return path


NUMBERS = {
    "a mask is missing": (range(1, 9), [1, 2, *range(4, 9)], r"lacks 1 masks for .*, of the numbers \[3\]"),
    "the first is missing": (range(1, 9), range(2, 9), r"of the numbers \[1\]; expected"),
    "both have the gap": ([1, 2, 4, 5, 6], [1, 2, 4, 5, 6], [0, 1, 3, 4, 5]),
    "more masks": (range(2, 9, 2), range(1, 9), [1, 3, 5, 7]),
    "counted from 0": (range(1, 6), range(5), [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_folders_of_numbered_images_are_matched_by_their_numbers(tmp_path: Path, name: str) -> None:
    clip, mask, wanted = NUMBERS[name]
    clips = folder(tmp_path / "clip", clip, grey(len(clip)))
    masks = folder(tmp_path / "mask", mask, [bars(9)[n - (mask[0] == 1) - (mask[0] > 1)] for n in mask])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if isinstance(wanted, str):
            with pytest.raises(VideoError, match=wanted):
                read_pair(ANY, clips, masks)
        else:
            assert places(read_pair(ANY, clips, masks)[1]) == wanted
    said = " ".join(str(warning.message) for warning in told)
    assert ("begins with number 0, the clip with 1" in said) == (name == "counted from 0")
    assert said.count("frames are missing after the numbers [2]") == {
        "a mask is missing": 1,
        "both have the gap": 2,
    }.get(name, 0)


def test_what_a_folder_leaves_out_or_reads_besides_is_named(tmp_path: Path, recwarn) -> None:
    path = folder(tmp_path / "a", [1, 2, 3], grey(3))
    for name in (".hidden.tga", "Thumbs.db", "desktop.ini"):
        (path / name).touch()
    read_clip(path)
    assert not recwarn.list
    (path / "0004.tga").touch()
    Image.fromarray(grey(1)[0]).save(path / "mask.png")
    with pytest.warns(UserWarning, match=r"1 files are no images.*\['0004.tga'\]; 1 images .* \['mask.png'\]\.$"):
        assert read_clip(path).pixels.shape[1] == 4


PAIRED = {
    "a mask beside each frame": ("a{}.png", "a{}_mask.png"),
    "two films": ("img{}.png", "mask{}.png"),
    "two formats": ("a{}.png", "a{}.bmp"),
}


@pytest.mark.parametrize("kind", PAIRED)
def test_a_folder_with_two_images_of_each_frame_is_named(tmp_path: Path, kind: str) -> None:
    for index, picture in enumerate(grey(4)):
        for name in PAIRED[kind]:
            Image.fromarray(picture).save(tmp_path / name.format(index))
    with pytest.warns(UserWarning, match="4 images are named unlike the others, but read as frames"):
        read_clip(tmp_path)


def test_frames_within_an_image_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    save(tmp_path / "masks" / "m.tif", bars(8), 125)
    with pytest.warns(UserWarning, match=r"m\.tif' holds 8 frames; of a folder's images the first is read"):
        read_clip(tmp_path / "masks")


def test_an_image_is_never_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript in a file of another name: Pillow would call Ghostscript."""
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "clip.png").write_bytes(page)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("ran PostScript"))
    with pytest.raises(VideoError, match=r"clip\.png' as an image"):
        read_clip(tmp_path / "clip.png")


def test_a_folder_in_a_folder_of_frames_is_no_frame(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", [1, 2, 3], grey(3))
    (path / "0004.png").mkdir()
    assert read_clip(path).pixels.shape[1] == 3


def test_frames_of_several_sizes_are_no_clip_and_no_mask(tmp_path: Path) -> None:
    mixed = folder(tmp_path / "mixed", [1, 2], [grey(1, 64, 64)[0], grey(1, 128, 32)[0]])
    even = folder(tmp_path / "even", [1, 2], [bars(1)[0][:, :64]] * 2)
    for pair in ((mixed, even), (even, mixed)):
        with pytest.raises(VideoError, match=r"different sizes, \[\(64, 64\), \(128, 32\)\].*size=\(height, width\)"):
            read_pair(SimpleNamespace(frames=2, size=(16, 16)), *pair)


def test_frames_that_are_picked_get_their_own_masks(tmp_path: Path) -> None:
    clip, mask = film(tmp_path / "clip.mp4", bars(9), 16), film(tmp_path / "mask.mp4", bars(9), 8)
    with pytest.warns(UserWarning, match="matched one by one"):
        source, region = read_pair(ANY, clip, mask, frames=5)
    assert places((source.pixels[:1] > 0).float()) == places(region) == [0, 2, 4, 6, 8]


def test_a_mask_of_a_fraction_of_the_clip_is_refused(tmp_path: Path) -> None:
    mask = film(tmp_path / "mask.mp4", bars(3), 8)
    with pytest.raises(VideoError, match=r"has 3 frames, 0.375 s, .* has 1 s: the mask ends before half of it"):
        read_pair(ANY, film(tmp_path / "clip.mp4", grey(8), 8), mask)


def test_a_mask_of_exactly_the_frames_that_are_edited_is_whole(tmp_path: Path, recwarn) -> None:
    clip, mask = film(tmp_path / "clip.mp4", bars(16), 8), film(tmp_path / "mask.mp4", bars(5), 8)
    model = SimpleNamespace(frames=None, size=None, fit=lambda *sides: sides, usual=(5, 16, 128))
    source, region = read_pair(model, clip, mask)
    assert places((source.pixels[:1] > 0).float()) == places(region) == [0, 1, 2, 3, 4]
    assert not recwarn.list


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_a_turned_tiff_is_read_as_it_looks(tmp_path: Path, turned: int, mode: str) -> None:
    page = np.zeros((48, 64), np.uint8)
    page[8:24, 8:40] = 255
    image = Image.fromarray(page * np.uint16(257)) if mode == "I;16" else Image.fromarray(page).convert(mode)
    image.getexif()[0x112] = turned
    image.save(tmp_path / "a.tif", exif=image.getexif())
    upright = Image.fromarray(page)
    upright.getexif()[0x112] = turned
    wanted = np.asarray(ImageOps.exif_transpose(upright)) > 128
    assert np.array_equal(read_clip(tmp_path / "a.tif").pixels[0, 0] > 0, wanted)


def test_a_folder_is_listed_once_however_many_masks_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, listed = folder(tmp_path / "masks", range(12), bars(12)), list[Path]()
    own = media.files_of
    monkeypatch.setattr(media, "files_of", lambda path: listed.append(path) or own(path))
    read_mask(masks, frames=6, size=(16, 128))
    first = len(listed)
    listed.clear()
    read_mask(masks, frames=12, size=(16, 128))
    assert len(listed) == first


def test_a_pair_is_read_for_a_model_by_name(tmp_path: Path) -> None:
    clip, mask = film(tmp_path / "a.mp4", ramp(8, 16, 64), 8), film(tmp_path / "b.mp4", bars(8, 8), 8)
    source, region = read_pair("tiny", clip, mask)
    assert (source.pixels.shape[1:], region.shape[1:]) == ((8, 64, 64), (8, 64, 64))
    with pytest.raises(KVLockError, match="frames='5'; expected a whole number"):
        read_pair(ANY, tmp_path / "a.mp4", tmp_path / "b.mp4", frames="5")


def test_a_short_clip_is_padded_with_its_mask(tmp_path: Path) -> None:
    clip, mask = film(tmp_path / "clip.mp4", ramp(5, 16, 128), 8), film(tmp_path / "mask.mp4", bars(5), 8)
    for model, asked in ((SimpleNamespace(frames=8, size=(16, 128)), {}), (ANY, {"frames": 8})):
        source, region = read_pair(model, clip, mask, **asked)
        assert indices(source.pixels) == places(region) == [0, 1, 2, 3, 4, 4, 4, 4]
        assert "5 frames of 16 x 128 read; 8 edited, the last one repeated; 0 left out" in source.note
    with pytest.raises(VideoError, match="has 5 frames; expected at least frames=8"):
        read_pair(ANY, clip, mask, frames=8, pad=False)
    with pytest.raises(KVLockError, match="frames=0"):
        read_pair(ANY, clip, mask, frames=0)


# what counts as painted


def test_every_painted_colour_counts_in_every_kind_of_image(tmp_path: Path, recwarn) -> None:
    colours = np.zeros((16, 128, 3), np.uint8)
    for column, colour in enumerate([(255, 0, 0), (0, 0, 255), (200, 30, 0), (0, 0, 130)]):
        colours[:, 16 * column : 16 * column + 8] = colour
    faint = np.maximum(colours, 1)  # a known exporter's black
    wanted = torch.from_numpy(colours.max(-1) >= 128).float().expand(1, 2, 16, 128)
    image = Image.fromarray(faint)
    image.save(tmp_path / "rgb.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(tmp_path / "palette.png")
    image.save(tmp_path / "noisy.jpg", quality=90, subsampling=0)
    transparent = np.concatenate([np.full_like(colours, 255), colours.max(-1, keepdims=True)], -1)
    Image.fromarray(transparent).save(tmp_path / "alpha.png")
    for name in ("rgb.png", "palette.png", "noisy.jpg", "alpha.png"):
        assert torch.equal(read_mask(tmp_path / name, frames=2, size=(16, 128)), wanted), name
    assert not recwarn.list


def test_a_mask_in_alpha_is_named(tmp_path: Path, recwarn) -> None:
    clip = film(tmp_path / "clip.mkv", grey(2, 48, 96))
    painted = np.zeros((48, 96), np.uint8)
    painted[8:40, 16:48] = 255
    photo = np.random.default_rng(0).integers(0, 256, (6, 12, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    for colours, alpha in ((0 * photo, painted), (photo, 255 - painted)):  # black on nothing; an erased hole
        Image.fromarray(np.dstack([colours, alpha])).save(tmp_path / "mask.png")
        with pytest.warns(UserWarning, match="has transparent parts, kept like black"):
            read_pair(ANY, clip, tmp_path / "mask.png")
    Image.fromarray(np.dstack([255 + 0 * photo, painted])).save(tmp_path / "mask.png")  # white on nothing
    recwarn.clear()
    assert torch.equal(read_pair(ANY, clip, tmp_path / "mask.png")[1][0, 0] > 0, torch.from_numpy(painted > 0))
    assert not recwarn
    strokes = np.dstack([255 + 0 * photo, painted])
    frames = folder(tmp_path / "frames", range(2), [strokes, 0 * strokes])  # the object leaves the picture
    assert read_pair(ANY, clip, frames)[1].sum() == (painted > 0).sum()
    opaque = np.dstack([painted[..., None].repeat(3, 2), np.full_like(painted, 255)])
    opaque[-1, :, 3] = 0
    Image.fromarray(opaque).save(tmp_path / "mask.png")
    assert read_pair(ANY, clip, tmp_path / "mask.png")[1][0, 0].sum() == (painted > 0).sum()
    assert not recwarn


def test_noise_of_compression_is_no_object(tmp_path: Path, recwarn) -> None:
    painted = np.zeros((48, 96), np.uint8)
    painted[8:40, 16:48] = 255
    Image.fromarray(painted).convert("RGB").save(tmp_path / "mask.webp", quality=50)
    assert torch.equal(
        read_mask(tmp_path / "mask.webp", frames=1, size=(48, 96))[0, 0], torch.from_numpy(painted) / 255
    )
    assert not recwarn


def test_objects_in_grey_are_named(tmp_path: Path) -> None:
    objects = np.zeros((16, 128), np.uint8)
    objects[:, 16:32], objects[:, 64:80] = 80, 240  # object indices, scaled to be seen
    Image.fromarray(objects).save(tmp_path / "mask.png")
    with pytest.warns(UserWarning, match=r"areas of grey 80 of 255, kept like black.*\(index > 0\) \* 255"):
        mask = read_mask(tmp_path / "mask.png", frames=1, size=(16, 128))
    assert mask.sum() == 16 * 16


INDEX = np.zeros((64, 64), np.uint8)
INDEX[16:40, 16:40] = 1
PALETTE = Image.fromarray(INDEX, "P")
PALETTE.putpalette([0, 0, 0, 1, 1, 1] + [0] * 762)
UNSEEN = {
    "8 bits": (Image.fromarray(INDEX), "index.png"),
    "a palette": (PALETTE, "index.png"),
    "16 bits with 255": (Image.fromarray(INDEX.astype(np.uint16) * 255), "index.png"),
    "16 bits with 4095": (Image.fromarray(INDEX.astype(np.uint16) * 4095), "index.png"),
    "32 bits": (Image.fromarray(INDEX.astype(np.int32)), "index.tif"),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_mask_too_dark_to_be_seen_is_not_read_as_empty(tmp_path: Path, kind: str) -> None:
    image, name = UNSEEN[kind]
    image.save(tmp_path / name)
    with pytest.raises(VideoError, match=r"nothing is white; the brightest value is (1|16) of 255.*\(index > 0\)"):
        read_mask(tmp_path / name, frames=1, size=(64, 64))


def test_bytes_in_16_bits_are_told_with_their_depth(tmp_path: Path) -> None:
    Image.fromarray(INDEX.astype(np.uint16) * 255).save(tmp_path / "mask.png")
    with pytest.raises(VideoError, match="1 of 255, or with 16 bits 257 of 65535"):
        read_mask(tmp_path / "mask.png", frames=1, size=(64, 64))


def test_a_film_that_is_black_but_for_its_noise_is_black(tmp_path: Path, recwarn) -> None:
    noise = np.random.default_rng(0).integers(0, 12, (4, 32, 32, 1)).repeat(3, -1).astype(np.uint8)
    path = film(tmp_path / "mask.mkv", list(noise), codec="ffv1", pix_fmt="bgr0")
    assert read_mask(path, frames=4, size=(32, 32)).sum() == 0
    assert not recwarn.list


def test_indices_beside_a_white_border_are_named(tmp_path: Path) -> None:
    border = INDEX.copy()
    border[15, 16:40] = border[40, 16:40] = 255  # "no object", as in VOC and ADE
    Image.fromarray(border).save(tmp_path / "mask.png")
    with pytest.warns(UserWarning, match="areas of grey 1 of 255, kept like black"):
        read_mask(tmp_path / "mask.png", frames=1, size=(64, 64))


@pytest.mark.parametrize("side", [8, 12, 20])
def test_a_small_object_in_grey_is_named(tmp_path: Path, side: int) -> None:
    painted = np.zeros((96, 96), np.uint8)
    painted[:30, :30], painted[60 : 60 + side, 60 : 60 + side] = 255, 100
    Image.fromarray(painted).save(tmp_path / "mask.png")
    with pytest.warns(UserWarning, match="areas of grey 100 of 255"):
        read_mask(tmp_path / "mask.png", frames=1, size=(96, 96))


@pytest.mark.parametrize("name", ["soft.png", "soft.jpg", "soft.webp", "soft.mp4"])
@pytest.mark.parametrize("radius", [0, 1, 2, 4, 8, 16, 32])
def test_a_soft_mask_is_no_mask_of_objects(tmp_path: Path, recwarn, radius: int, name: str) -> None:
    hard = np.zeros((256, 256), np.uint8)
    hard[64:160, 96:200] = 255
    soft = Image.fromarray(hard).filter(ImageFilter.GaussianBlur(radius)).convert("RGB")
    film(tmp_path / name, [np.asarray(soft)] * 2) if name.endswith("mp4") else soft.save(tmp_path / name)
    assert read_mask(tmp_path / name, frames=2, size=(256, 256)).sum() > 0
    assert not recwarn.list


@pytest.mark.parametrize(("strength", "told"), [(0.3, True), (0.4, True), (0.49, True), (0.6, False)])
def test_a_region_of_a_faint_soft_brush_is_named(tmp_path: Path, recwarn, strength: float, told: bool) -> None:
    y, x = np.mgrid[:256, :256]
    brush = 255 * strength * (1 - np.hypot(y - 170, x - 170) / 70).clip(0)
    painted = np.where(np.hypot(y - 60, x - 60) < 30, 255, brush).astype(np.uint8)
    Image.fromarray(painted).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", frames=1, size=(256, 256)).sum() == (painted >= 128).sum()
    said = [str(w.message) for w in recwarn.list]
    assert [f"areas of grey {int(255 * strength)} of 255" in text for text in said] == [True] * told


@pytest.mark.parametrize("name", ["mask.jpg", "mask.webp", "mask.mp4", "folder"])
def test_128_is_white_whatever_loss_made_of_it(tmp_path: Path, name: str) -> None:
    painted = np.zeros((256, 256, 3), np.uint8)
    painted[64:160, 64:160, 0] = 128
    path = tmp_path / name
    if name == "mask.mp4":
        film(path, [painted] * 2, options={"crf": "23"})
    else:
        Image.fromarray(painted).save(path if name != "folder" else folder(path, [], []) / "1.jpg", quality=50)
    mask = read_mask(path, frames=1, size=(256, 256))[0, 0]
    assert mask[66:158, 66:158].all()
    assert mask.sum() <= 100 * 100


def test_16_bits_of_either_scale_are_the_8_bits(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for scale in (256, 257):
        Image.fromarray(grey * scale).save(tmp_path / "grey.png")
        pixels = read_clip(tmp_path / "grey.png").pixels[0, 0]
        assert torch.equal(((pixels + 1) * 127.5).round(), torch.from_numpy(grey.astype(np.float32)))


# what a file says beyond its pixels


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    hdr = film(tmp_path / "hdr.mp4", ramp(3), pix_fmt="yuv420p10le", color_trc=16, color_primaries=9)
    with pytest.warns(UserWarning, match="HDR or a wide gamut, without tone mapping"):
        read_clip(hdr)
    lines = film(tmp_path / "lines.mp4", ramp(3, 32, 32), options={"x264-params": "tff=1"})
    with pytest.warns(UserWarning, match="interlaced lines, as they are"):
        read_clip(lines)
    layer = film(tmp_path / "layer.webm", ramp(3), codec="libvpx-vp9", pix_fmt="yuva420p")
    with pytest.warns(UserWarning, match="alpha in a layer of its own, not at all"):
        read_clip(layer)


def test_alpha_of_a_film_lies_on_black(tmp_path: Path) -> None:
    clear = np.full((16, 16, 4), 255, np.uint8)
    clear[8:, :, 3] = 0
    pixels = read_clip(film(tmp_path / "clip.mov", [clear] * 2, codec="qtrle", pix_fmt="argb")).pixels
    assert (pixels[:, :, :8] == 1).all()
    assert (pixels[:, :, 8:] == -1).all()


# sound


def spoken(
    path: Path,
    *,
    codec: str | None = "aac",
    rate: int = 44100,
    pictures: list[np.ndarray] | None = None,
    video: str = "libx264",
    tracks: int = 1,
) -> Path:
    """A film of 30 frames per second with a tone, between its pictures."""
    pictures, sent = ramp(24, 48, 64) if pictures is None else pictures, 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream(video, rate=30)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        sounds = [container.add_stream(codec, rate=rate) for _ in range(tracks if codec else 0)]
        for sound in sounds:
            sound.layout = "mono"
        for number, image in enumerate(pictures, 1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            while sounds and 1024 * (sent + 1) <= number * rate // 30:
                wave = np.sin(np.arange(1024 * sent, 1024 * sent + 1024, dtype=np.float32) / 20)[None] / 3
                for sound in sounds:
                    kind = sound.format.name.removesuffix("p")
                    samples = (wave * 32000).astype(np.int16) if kind == "s16" else wave
                    chunk = av.AudioFrame.from_ndarray(samples, format=sound.format.name, layout="mono")
                    chunk.rate, chunk.pts = rate, 1024 * sent
                    container.mux(sound.encode(chunk))
                sent += 1
        for each in (stream, *sounds):
            container.mux(each.encode())
    return path


def heard(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(p) for p in container.demux(audio=0) if p.size] if container.streams.audio else []


@pytest.mark.parametrize(("codec", "rate", "suffix"), [("aac", 44100, ".mp4"), ("libopus", 48000, ".webm")])
def test_sound_is_copied_and_cut_with_the_frames(tmp_path: Path, codec: str, rate: int, suffix: str) -> None:
    source = spoken(tmp_path / "clip.mkv", codec=codec, rate=rate)
    said = write_clip(tmp_path / f"out{suffix}", torch.zeros(3, 12, 48, 64), fps=30, sound=source)
    assert said == "sound copied"
    before, after = heard(source), heard(tmp_path / f"out{suffix}")
    assert 0.4 < len(after) / len(before) < 0.6  # 12 of 24 frames
    assert any(after == before[start : start + len(after)] for start in (0, 1, 2))  # without what primes the decoder
    assert read_clip(tmp_path / f"out{suffix}").pixels.shape[1] == 12


@pytest.mark.parametrize(("codec", "suffix"), [("aac", ".mp4"), ("aac", ".mov"), ("libopus", ".webm")])
def test_sound_begins_with_what_primes_its_decoder(tmp_path: Path, codec: str, suffix: str) -> None:
    def begins(path: Path) -> float:
        with av.open(str(path)) as container:
            packet = next(container.demux(container.streams.audio[0]))
            return float(packet.pts * packet.time_base)

    source = spoken(
        tmp_path / f"clip{suffix}", codec=codec, rate=48000, video="libvpx-vp9" if codec != "aac" else "libx264"
    )
    write_clip(tmp_path / f"out{suffix}", torch.zeros(3, 12, 48, 64), fps=30, sound=source)
    assert begins(tmp_path / f"out{suffix}") == pytest.approx(begins(source), abs=1e-3)
    assert begins(source) < -0.005
    assert len(read_clip(tmp_path / f"out{suffix}").pixels[0]) == 12


def test_every_sound_track_is_copied(tmp_path: Path) -> None:
    source = spoken(tmp_path / "clip.mkv", tracks=3)
    assert write_clip(tmp_path / "out.mp4", torch.zeros(3, 24, 48, 64), fps=30, sound=source) == "sound copied"
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert len(container.streams.audio) == 3
        sizes = [sum(p.size for p in container.demux(track)) for track in container.streams.audio[:1]]
    assert sizes[0] > 1000


def test_the_sound_of_a_film_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken(tmp_path / "clip.mkv")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_clip(tmp_path / "out.mp4", torch.zeros(3, 24, 48, 64), fps=30, sound="~/clip.mkv") == "sound copied"


def test_a_muxer_that_refuses_the_sound_is_not_blamed_on_the_clip(tmp_path: Path) -> None:
    source = spoken(tmp_path / "clip.mkv", codec="flac", rate=48000)
    said = write_clip(tmp_path / "out.mov", torch.zeros(3, 4, 48, 64), fps=30, sound=source)
    assert said == "sound left out, as this container does not hold flac"
    assert read_clip(tmp_path / "out.mov").pixels.shape[1] == 4


def test_a_track_that_a_container_refuses_costs_no_other(tmp_path: Path) -> None:
    aac, opus = (spoken(tmp_path / f"{codec}.mkv", codec=codec, rate=48000) for codec in ("aac", "libopus"))
    with av.open(str(tmp_path / "two.mkv"), "w") as both, av.open(str(aac)) as first, av.open(str(opus)) as second:
        streams = [*first.streams, second.streams.audio[0]]
        copies = {stream: both.add_stream_from_template(stream) for stream in streams}
        for copy, language in zip(list(copies.values())[1:], ("deu", "eng"), strict=True):
            copy.metadata["language"] = language
        for packet in (p for c in (first.demux(), second.demux(audio=0)) for p in c if p.dts is not None):
            packet.stream = copies[packet.stream]
            both.mux(packet)
    pixels = torch.zeros(3, 24, 48, 64)
    assert write_clip(tmp_path / "out.mov", pixels, 30, sound=tmp_path / "two.mkv") == "sound copied, 1 of 2 tracks"
    assert write_clip(tmp_path / "out.mp4", pixels, 30, sound=tmp_path / "two.mkv") == "sound copied"
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [track.metadata["language"] for track in container.streams.audio] == ["deu", "eng"]


def test_a_track_without_a_decoder_costs_no_other(tmp_path: Path) -> None:
    data = spoken(tmp_path / "clip.mov", tracks=2).read_bytes()
    for known, unknown in ((b"mp4a", b"apac"), (b"esds", b"esdx")):  # as phones write spatial sound
        place = data.index(known, data.rindex(b"stsd"))
        data = data[:place] + unknown + data[place + 4 :]
    (tmp_path / "phone.mov").write_bytes(data)
    with av.open(str(tmp_path / "phone.mov")) as container:
        assert [track.codec_context is None for track in container.streams.audio] == [False, True]
    said = write_clip(tmp_path / "out.mp4", torch.zeros(3, 24, 48, 64), fps=30, sound=tmp_path / "phone.mov")
    assert said == "sound copied, 1 of 2 tracks"
    assert heard(tmp_path / "out.mp4")


def test_sound_lies_beside_its_pictures(tmp_path: Path) -> None:
    source = spoken(tmp_path / "clip.mp4", pictures=[np.zeros((16, 16, 3), np.uint8)] * 750)  # 25 s
    write_clip(tmp_path / "out.mp4", torch.zeros(3, 750, 16, 16), fps=30, sound=source)
    with av.open(str(tmp_path / "out.mp4")) as container:
        packets = [p for p in container.demux() if p.size and p.dts is not None]
        order = [(p.stream.type, float(p.dts * p.time_base)) for p in sorted(packets, key=lambda p: p.pos)]
    last, apart = {"audio": 0.0, "video": 0.0}, 0.0
    for kind, moment in order:
        last[kind] = moment
        apart = max(apart, abs(last["audio"] - last["video"]))
    assert apart < 2


@pytest.mark.parametrize("name", ["voice.m4a", "talk.wav"])
def test_sound_of_no_film_is_named(tmp_path: Path, name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name}' is no film; expected one that ends in .mp4"):
        assert write_clip(tmp_path / "out.mp4", torch.zeros(3, 4, 48, 64), sound=tmp_path / name) == ""


def test_sound_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    source, pixels = spoken(tmp_path / "clip.mp4"), torch.zeros(3, 3, 48, 64)
    assert (
        write_clip(tmp_path / "out.webm", pixels, sound=source) == "sound left out, as this container does not hold aac"
    )
    assert write_clip(tmp_path / "out.gif", pixels, sound=source) == "a .gif holds no sound"
    assert write_clip(tmp_path / "out.mp4", pixels, sound=film(tmp_path / "mute.mp4", ramp(3))) == ""
    assert write_clip(tmp_path / "out.mp4", pixels, sound=tmp_path / "out.gif") == ""
    source.write_bytes(source.read_bytes()[:2000])
    with pytest.warns(UserWarning, match="without sound: cannot read"):
        assert write_clip(tmp_path / "out.mp4", pixels, sound=source) == ""
    assert read_clip(tmp_path / "out.mp4").pixels.shape[1] == 3  # the work of a model is not lost


# files that are damaged, or no files


def test_titles_in_another_encoding_do_not_matter(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.mp4", ramp(3), tags={"title": "a name to be replaced"})
    path.write_bytes(path.read_bytes().replace(b"a name to be replaced", b"\xff\xfe a caf\xe9 in Latin-1 "))
    assert indices(read_clip(path).pixels) == [0, 1, 2]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.mp4")
    with pytest.raises(VideoError, match="no such file"):
        read_clip(tmp_path / "clip.mp4")


def test_images_of_floats_and_of_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(VideoError, match="its pixels are floats"):
        read_clip(tmp_path / "floats.tiff")
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(VideoError, match=r"bomb.png' as an image: .*DecompressionBombError"):
        read_clip(tmp_path / "bomb.png")


def noisy(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(count)]


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".avi", "mpeg4")])
def test_frames_that_a_decoder_guesses_are_named(tmp_path: Path, suffix: str, codec: str) -> None:
    path = film(tmp_path / f"clip{suffix}", noisy(24), 12, codec=codec)
    with av.open(str(path)) as container:
        at, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][12]
    data = bytearray(path.read_bytes())
    for place in range(at + size // 2, at + size // 2 + 64):
        data[place] ^= 0x5A
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="has damaged frames, of which a decoder guesses parts"):
        read_clip(path)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".avi", "mpeg4")])
def test_a_film_that_lacks_its_last_frames_is_named(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w", options={"movflags": "faststart"} if suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=30, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in noisy(300):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        at = [p.pos for p in container.demux(video=0) if p.size][291]
    path.write_bytes(path.read_bytes()[:at])
    with pytest.warns(UserWarning, match="ends after 9.7 of 10 seconds. Is it complete"):
        assert read_clip(path).pixels.shape[1] == 291


@pytest.mark.skipif("libx265" not in av.codecs_available, reason="this build of ffmpeg has no libx265")
def test_a_film_cut_between_key_frames_holds_its_first_whole_frame(tmp_path: Path) -> None:
    params = "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0:log-level=none"
    whole = film(tmp_path / "whole.mkv", ramp(24, 48, 64), codec="libx265", options={"x265-params": params, "crf": "5"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mkv"), "w") as cut:
        copied, keys, start = cut.add_stream_from_template(source.streams.video[0]), -1, None
        for packet in (p for p in source.demux(video=0) if p.dts is not None):
            keys += packet.is_keyframe
            if keys > 0:
                start = packet.dts if start is None else start
                packet.stream, packet.pts, packet.dts = copied, packet.pts - start, packet.dts - start
                cut.mux(packet)
    with pytest.warns(UserWarning, match="the first 3 frames of .* need others that it lacks"):
        assert indices(read_clip(tmp_path / "cut.mkv").pixels) == [16, 16, 16, *range(16, 24)]


def test_a_film_that_lacks_a_second_of_thirty_is_not_whole(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 32, 32, 3)).astype(np.uint8)
    path = film(tmp_path / "clip.mkv", list(noise))
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * 0.965)])
    with pytest.raises(VideoError, match=r"ends after 2\d(\.\d)? of 30 seconds"):
        read_clip(path)


def test_a_film_cut_off_is_no_shorter_film(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3)).astype(np.uint8)
    for name in ("clip.mkv", "clip.mp4"):
        whole = film(tmp_path / name, list(noise)).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(VideoError, match=r"ends after|cannot read"):
            read_clip(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "sound"), [("a.mkv", "aac"), ("a.webm", "libopus"), ("a.avi", "pcm_s16le"), ("a.avi", None)]
)
def test_a_film_with_sound_cut_off_is_no_shorter_film(tmp_path: Path, name: str, sound: str | None) -> None:
    video = {"a.mkv": "libx264", "a.webm": "libvpx-vp9", "a.avi": "mpeg4"}[name]
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 64, 3)).astype(np.uint8)
    path = spoken(tmp_path / name, pictures=list(noise), codec=sound, rate=48000, video=video)
    assert read_clip(path).pixels.shape[1] == 48
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"ends after .* of (1\.6|2).* Is it complete"):
        read_clip(path)


@pytest.mark.parametrize("name", ["12:30.mp4", "take-1:2.gif", "a:b/1.png", "c:/x.webm"])
def test_a_colon_in_a_relative_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(name, torch.zeros(3, 2, 16, 16))
    assert read_clip(name).pixels.shape[0] == 3


def small_files(folder: Path) -> dict[str, bytes]:
    """A small clip in every kind of file."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 2, 4, 4, generator=generator) * 2 - 1
    clip = torch.nn.functional.interpolate(coarse, size=(5, 24, 32), mode="trilinear")[0]
    for name in ("a.mp4", "a.mov", "a.webm", "a.gif", "a.png"):
        write_clip(folder / name, clip, fps=12)
    pages = list(((clip.permute(1, 2, 3, 0) + 1) * 127.5).byte().numpy())
    film(folder / "a.mkv", pages)
    save(folder / "a.apng", pages, 80, format="PNG")
    save(folder / "a.webp", pages, 80)
    Image.fromarray(pages[0]).save(folder / "a.jpg")
    Image.fromarray(pages[0]).convert("P").save(folder / "b.png")
    save(folder / "a.tiff", pages, 80, compression="tiff_lzw")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """The bytes cut off, or with some zeroed, some flipped, or one near the beginning replaced."""
    out, start = bytearray(data), int(random.integers(len(data)))
    how = random.integers(4)
    if how == 0:
        return data[:start]
    if how == 1:
        out[start : start + 40] = bytes(len(out[start : start + 40]))
    if how == 2:
        for at in random.integers(0, len(data), 6):
            out[at] ^= 1 << random.integers(8)
    if how == 3:
        out[random.integers(min(len(data), 200))] = random.integers(256)
    return bytes(out)


@pytest.mark.filterwarnings("ignore")
def test_four_hundred_damaged_files_end_in_our_error_or_a_clip(tmp_path: Path) -> None:
    random, refused = np.random.default_rng(0), 0
    (tmp_path / "good").mkdir()
    (tmp_path / "frames").mkdir()
    good = small_files(tmp_path / "good")
    for index in range(400):
        name = list(good)[index % len(good)]
        path = tmp_path / f"bad{Path(name).suffix}"
        if index % 8 == 0:  # a folder, one file of which is damaged
            name = "a.jpg" if index % 16 else "b.png"
            path = tmp_path / "frames" / name
            (tmp_path / "frames" / "c.png").write_bytes(good["b.png"])
        path.write_bytes(damaged(good[name], random))
        read = path if index % 8 else path.parent
        try:
            if index % 3:
                clip = read_clip(read)
                assert torch.isfinite(clip.pixels).all()
                assert clip.pixels.abs().max() <= 1
                assert clip.pixels.shape[0] == 3
                assert 1 <= clip.pixels.shape[1] <= 1000
                assert 0 < clip.fps <= 1000
            else:
                mask = read_mask(read, frames=3, size=(8, 8), pad=True)
                assert set(mask.unique().tolist()) <= {0, 1}
        except KVLockError:
            refused += 1
    assert 100 < refused < 350  # both happen


@pytest.mark.parametrize("rate", [8, 16, 24])
def test_masks_of_the_frames_that_are_read_are_theirs_at_any_rate_of_their_film(tmp_path: Path, rate: int) -> None:
    """As tools save them, which do not know the rate of the clip."""
    clip = film(tmp_path / "clip.mp4", bars(12), 30, times=[(i + (i >= 4)) / 30 for i in range(12)])
    read = read_clip(clip).pixels
    assert read.shape[1] == 13
    shown = places((read[:1] > 0).float())
    mask = film(tmp_path / "mask.mp4", [bars(12)[i] for i in shown], rate)
    assert places(read_pair(ANY, clip, mask)[1]) == shown


def test_takes_with_pauses_between_them_double_no_frame() -> None:
    spans = np.ones(120) / 25
    spans[39] = 0.73
    spans[79] = 1.11
    assert read._beats(np.append(0, np.cumsum(spans))) == 164


def test_few_frames_of_a_folder_are_decoded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = folder(tmp_path / "frames", range(40), grey(40)), []
    pages = media._pages
    monkeypatch.setattr(media, "_pages", lambda file: (opened.append(file.name), pages(file))[1])
    assert read_clip(path, frames=3).pixels.shape[1] == 3
    assert len(opened) == 3


def test_an_image_with_broken_tags_is_read_without_them(tmp_path):
    """As every viewer does; tools of this field have written such files."""
    Image.new("RGB", (64, 48), (9, 200, 9)).save(tmp_path / "whole.png")
    Image.new("RGB", (64, 48), (9, 200, 9)).save(tmp_path / "broken.png", exif=b"Exif\0\0b'Exif")
    whole, broken = (read_clip(tmp_path / name).pixels for name in ("whole.png", "broken.png"))
    assert torch.equal(whole, broken)


def test_a_pipeline_in_the_place_of_a_model_is_told(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "clip.png")
    with pytest.raises(KVLockError, match=r"object lacks denoiser.*kv.from_pipeline\(pipe\)"):
        read_pair(object(), tmp_path / "clip.png", tmp_path / "clip.png")
