"""`kvlock web` as a user meets it: Debian's chromium, a mouse, a keyboard, two tabs, a phone, the dark."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from web import free_port, hostile

from kvlock_sampling import tiny
from kvlock_sampling.app import edit_video
from kvlock_sampling.app.web import served
from kvlock_sampling.app.web._session import EXAMPLES

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="the page needs gradio: pip install 'kvlock-sampling[web]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

NAMES = list(EXAMPLES)
SLOW = 60_000  # ms; software rendering of the canvas takes seconds for a stroke


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def video() -> tiny.TinyVideo:
    return tiny.load()


@pytest.fixture(scope="module")
def address(video: tiny.TinyVideo) -> Iterator[str]:
    with served(lambda: video, free_port(), {}) as (found, _):
        yield found


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page in a new context, and wait until its example is shown."""
    contexts = []

    def opened(address: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.goto(address)
        page.wait_for_selector("#tokens img")
        return page

    yield opened
    for context in contexts:
        context.close()


def set_number(page: Any, label: str, value: object) -> None:
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Enter")


def tokens(page: Any, text: str) -> None:
    page.wait_for_function(f"document.querySelector('#tokens').innerText.includes({text!r})")


def stroke(page: Any, *points: tuple[int, int]) -> None:
    """Draw from point to point, in pixels from the middle of the canvas."""
    canvas = page.locator("#editor canvas").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x + points[0][0], y + points[0][1])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(x + point[0], y + point[1], steps=2)
    page.mouse.up()


def hooked(video: tiny.TinyVideo) -> bool:
    """Whether a lock is at work. A hooked module has a subclass of its class, while a call is made."""
    return any(hasattr(type(module), "_kvlock_hooked") for module in video.network.modules())


def soon(true: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def idle(video: tiny.TinyVideo) -> bool:
    """Whether no call was locked for a second."""
    return soon(lambda: not hooked(video)) and not any(hooked(video) for _ in range(50) if not time.sleep(0.02))


def full_lock(page: Any, **numbers: int) -> None:
    page.get_by_label("Policy", exact=True).click()
    page.get_by_role("option", name=re.compile("^full:")).click()
    page.get_by_role("button", name="Sampling").click()
    for label, value in numbers.items():
        set_number(page, label.replace("_", " "), value)


def test_from_the_command_to_the_same_bits(visit: Callable[..., Any], tmp_path: Path) -> None:
    """Example, a mask drawn with the mouse, an edit; then the downloaded files and the line make the same film."""
    port, folder = free_port(), tmp_path / "server"
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    words = [sys.executable, "-m", "kvlock_sampling.app"]
    started = time.monotonic()
    server = subprocess.Popen([*words, "web", "--port", str(port)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}/" in server.stdout.readline()
        page = visit(f"http://127.0.0.1:{port}/")
        stroke(page, (-30, 20), (10, 0), (60, 40), (0, 80), (-30, 20))
        tokens(page, "drawn on frame 0")
        page.click("#edit")
        page.wait_for_selector("#view img")
        print(f"from the command to the first result, with a drawing: {time.monotonic() - started:.1f} s")
        assert time.monotonic() - started < 120
        page.wait_for_function("document.querySelector('#together video').currentTime > 0.2")
        assert page.locator("#figures img[alt='Trace of default']").is_visible()
        assert page.locator("#view img[alt='Tokens let go in frame 0']").is_visible()
        numbers = page.inner_text("#numbers")

        line = shlex.split(page.locator("#shell textarea").input_value())
        for link in page.locator("a[download]").all():
            name = link.get_attribute("download")
            if name in ("clip.mkv", "mask.png", "default.toml", "default.mp4"):
                with page.expect_download() as download:
                    link.click()
                download.value.save_as(tmp_path / "there" / name)
        wanted = (tmp_path / "there" / "default.mp4").read_bytes()
        (tmp_path / "there" / "default.mp4").unlink()
        done = subprocess.run([*words, *line[1:]], cwd=tmp_path / "there", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "there" / "default.mp4").read_bytes() == wanted
        passes = re.search(r"(\d+) model passes", done.stdout)
        assert passes is not None
        assert f"model passes\t{passes[1]}" in numbers
        page.close()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    assert server.returncode == 0
    assert [f.name for f in folder.iterdir() if not f.name.startswith("torch")] == []  # nothing is left behind


def test_drawings_on_frames_are_joined_and_stay(visit: Callable[..., Any], address: str) -> None:
    page = visit(address)
    stroke(page, (-60, -60), (-40, -40))
    tokens(page, "drawn on frame 0")
    set_number(page, "Frame to draw on", 6)
    page.wait_for_timeout(3000)
    stroke(page, (60, 60), (70, 70))
    tokens(page, "drawn on frame 0, 6")
    for frame in (3, 0, 6):
        set_number(page, "Frame to draw on", frame)
        page.wait_for_timeout(3000)
        tokens(page, "drawn on frame 0, 6")
    page.get_by_role("button", name="Clear the mask").click()
    tokens(page, "the mask is 0 everywhere: nothing to edit")
    page.click("#edit")
    told = page.get_by_text("the mask is 0 everywhere: nothing to edit. Paint the region to edit with 1")
    told.nth(1).wait_for()  # the first is beside the mask


def test_a_cancelled_run_ends_at_once_and_leaves_no_hook(
    visit: Callable[..., Any], address: str, video: tiny.TinyVideo
) -> None:
    page = visit(address)
    full_lock(page, Steps=100)
    page.click("#edit")
    page.get_by_text(re.compile(r"step [3-9] of 100")).first.wait_for()
    assert soon(lambda: hooked(video))
    page.click("#cancel")
    page.get_by_text("Cancelled. Nothing of this run was kept.").wait_for()
    assert idle(video)
    assert not page.locator("#view img").first.is_visible()
    set_number(page, "Steps", 2)
    page.click("#edit")
    page.wait_for_selector("#view img")


def test_a_tab_that_is_closed_ends_its_run_and_takes_its_files(
    visit: Callable[..., Any], address: str, video: tiny.TinyVideo
) -> None:
    root = Path(os.environ["GRADIO_TEMP_DIR"]).parent
    others = set(root.glob("*/*/*/clip.mkv"))
    page = visit(address)
    (mine,) = set(root.glob("*/*/*/clip.mkv")) - others
    full_lock(page, Steps=100)
    page.click("#edit")
    page.get_by_text(re.compile(r"step [3-9] of 100")).first.wait_for()
    page.close()
    assert soon(lambda: not mine.parents[2].exists())
    assert idle(video)


def test_two_tabs_at_once_do_not_mix(visit: Callable[..., Any], address: str, video: tiny.TinyVideo) -> None:
    pages = [visit(address), visit(address)]
    for page, name in zip(pages, NAMES[1:3], strict=True):
        page.get_by_label("Example").click()
        page.get_by_role("option", name=name).click()
        page.get_by_role("button", name="Sampling").click()
        set_number(page, "Steps", 4)
        page.wait_for_timeout(1500)
    for page in pages:
        page.click("#edit")
    for page, name in zip(pages, NAMES[1:3], strict=True):
        page.wait_for_selector("#view img")
        before, after = tiny.sample_edit(*EXAMPLES[name])
        assert f"--prompt '{after.prompt}'" in page.locator("#shell textarea").input_value()
        # The page's clip is rounded to bytes.
        clip = (tiny.render([before]) * 127.5).round() / 127.5
        mask = tiny.edit_mask([before], [after])
        edit = edit_video(clip, mask, after.prompt, source_prompt=before.prompt, model=video, steps=4)
        assert f"model passes\t{edit.nfe}" in page.inner_text("#numbers")


def test_policies_are_compared_on_one_seed(visit: Callable[..., Any], address: str) -> None:
    page = visit(address)
    page.get_by_label("Compare with two others").click()
    for name in ("full", "static"):
        page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Sampling").click()
    set_number(page, "Steps", 3)
    set_number(page, "Seeds to try; the best is finished", 2)
    set_number(page, "Width of the transition band in tokens", 1)
    page.wait_for_timeout(1000)
    page.click("#edit")
    page.wait_for_selector("#view img")
    table = page.inner_text("#numbers")
    assert "default\tfull\tstatic" in table
    assert "in the transition band" in table
    assert page.locator("#figures img").count() == 6  # a sheet of seeds and a trace of each
    page.get_by_role("radio", name="static").check()
    page.locator("#view [aria-label*='static to the right']").wait_for()
    assert page.locator("#shell textarea").input_value().count("--transition 1.0 0.5") == 3


def test_a_broken_upload_is_one_message_and_the_page_lives_on(
    visit: Callable[..., Any], address: str, tmp_path: Path
) -> None:
    page, (name, content, wanted) = visit(address), hostile(tmp_path)["an archive called a film"]
    (tmp_path / name).write_bytes(content)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a clip or an image").click()
    chooser.value.set_files(tmp_path / name)
    page.get_by_text(wanted).wait_for()
    assert page.get_by_text(wanted).count() == 1
    page.get_by_label("Example").click()
    page.get_by_role("option", name=NAMES[4]).click()
    page.wait_for_function("document.querySelector('#tokens').innerText.includes('locked of the clip')")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_desk_by_keyboard_and_without_other_hosts(
    visit: Callable[..., Any], address: str, width: int, scheme: str
) -> None:
    page = visit(address, viewport={"width": width, "height": 844}, color_scheme=scheme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_selector("#tokens img")
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade)[:3])) < 200) == (scheme == "dark")
    reached = set()
    page.evaluate("document.body.focus()")
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''").strip())
        if "Edit" in reached:
            break
    assert {"Upload a clip or an image", "Clear the mask", "Upload a mask", "Edit"} <= reached
    page.keyboard.press("Enter")
    page.wait_for_selector("#view img")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wipe = page.locator("#view input[type=range]")
    wipe.focus()
    page.keyboard.press("ArrowRight")
    assert wipe.input_value() == "51"
    assert "--at" in page.locator("#view .kv-wipe").get_attribute("style")
    box = page.locator("#view .kv-wipe").bounding_box()
    # Waits until the wipe rests and nothing lies over it, as a hand does.
    page.locator("#view .kv-wipe").click(position={"x": 0.3 * box["width"], "y": 0.5 * box["height"]})
    assert abs(int(wipe.input_value()) - 30) <= 3
