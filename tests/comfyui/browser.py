"""ComfyUI's own page in Debian's chromium."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


SIZES = {
    "SaveAnimatedWEBP": [330, 420],
    "KVLockTrace": [330, 560],
    "KVLockMask": [330, 430],
    "PreviewImage": [820, 300],
}


class Page:
    def __init__(self, page, server) -> None:
        self.page, self.server = page, server

    def workflow(self, graph: dict, name: str) -> dict:
        """A graph of the API in the browser's form, arranged."""
        self.page.evaluate(
            """async ([g, n, sizes]) => {
                await app.loadApiJson(g, n);
                for (const x of app.graph._nodes) if (sizes[x.type]) x.setSize(sizes[x.type]);
                app.graph.arrange(40);
            }""",
            [graph, name, SIZES],
        )
        time.sleep(1)
        made = self.page.evaluate("() => app.graph.serialize()")
        return json.loads(json.dumps(made).replace('"randomize"', '"fixed"'))

    def load(self, path: Path) -> None:
        self.page.evaluate("async g => { await app.loadGraphData(g); }", json.loads(path.read_text(encoding="utf-8")))
        time.sleep(1)

    def run(self, seconds: float = 240) -> dict:
        """Press Run, wait for the result, and return what the nodes show."""
        before = set(self.server.get("/history"))
        self.page.get_by_role("button", name="Run", exact=True).first.click()
        for _ in range(int(seconds / 0.2)):
            done = {k: v for k, v in self.server.get("/history").items() if k not in before}
            if done and all(v["status"].get("status_str") for v in done.values()):
                assert all(v["status"]["status_str"] == "success" for v in done.values()), done
                time.sleep(1.5)  # pictures load
                return self.page.evaluate("() => app.nodeOutputs")
            time.sleep(0.2)
        raise TimeoutError("the run did not end")

    def picture(self, path: Path) -> None:
        """The whole graph, near enough that its text can be read."""
        ends = "() => app.graph._nodes.map(n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]])"
        left, top, right, bottom = (list(side) for side in zip(*self.page.evaluate(ends), strict=True))
        x, y, zoom = min(left), min(top), 0.75
        size = {"width": int((max(right) - x) * zoom) + 120, "height": int((max(bottom) - y) * zoom) + 180}
        self.page.set_viewport_size(size)
        look = """([x, y, z]) => {
            const d = app.canvas.ds;
            d.scale = z;
            d.offset = [85 / z - x, 120 / z - y];
            app.canvas.setDirty(true, true);
        }"""
        self.page.evaluate(look, [x, y, zoom])
        time.sleep(6)  # notices go away
        self.page.screenshot(path=str(path))


@contextmanager
def opened(server) -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            page.goto(server.url)
            page.wait_for_function("() => window.app?.graph && window.app?.canvas", timeout=60_000)
            time.sleep(2)
            page.keyboard.press("Escape")  # the dialog of templates, at the first start
            yield Page(page, server)
        finally:
            browser.close()
