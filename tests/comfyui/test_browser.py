"""The example workflow in ComfyUI's page: load it, press Run, and see the result and the trace."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from browser import CHROMIUM, opened
from serving import ROOT, serving
from workflows import WORKFLOWS

missing = [name for name in ("playwright", "comfyui_frontend_package") if importlib.util.find_spec(name) is None]
if missing or CHROMIUM is None:
    pytest.skip(f"needs chromium and {', '.join(missing) or 'playwright'}", allow_module_level=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("comfyui")) as server, opened(server) as page:
        yield page


@pytest.mark.parametrize(
    ("name", "result"), [("kvlock_example", "SaveAnimatedWEBP"), ("kvlock_compare_policies", "PreviewImage")]
)
def test_load_an_example_press_run_and_see_the_result(page, name, result):
    page.load(ROOT / f"comfyui/example_workflows/{name}.json")
    shown = page.run()
    kinds = {key: page.page.evaluate("id => app.graph.getNodeById(id)?.type", int(key)) for key in shown}
    for kind in ("KVLockTrace", result):
        key = next(key for key, found in kinds.items() if found == kind)
        assert shown[key]["images"], kind


def test_a_bypassed_node_leaves_the_plain_model(page):
    """Mode 4 is ComfyUI's bypass: the sampler gets the model that the lock's node got."""
    page.load(ROOT / "comfyui/example_workflows/kvlock_example.json")
    page.page.evaluate(
        """() => { for (const n of app.graph._nodes) {
            if (["KVLock", "KVLockTrace"].includes(n.type)) n.mode = 4;
            if (n.type == "KSampler") for (const w of n.widgets) if (w.name == "steps") w.value = 2; } }"""
    )
    page.run()
    last = max(page.server.get("/history").values(), key=lambda run: run["prompt"][0])
    graph = last["prompt"][2]
    assert "KVLock" not in {part["class_type"] for part in graph.values()}


def test_the_files_are_what_the_script_writes():
    for name, make in WORKFLOWS.items():
        api = json.loads((ROOT / f"comfyui/api_workflows/{name}.json").read_text(encoding="utf-8"))
        assert api == make(), f"run {sys.executable} workflows.py"
        ui = json.loads((ROOT / f"comfyui/example_workflows/{name}.json").read_text(encoding="utf-8"))
        assert sorted(n["type"] for n in ui["nodes"]) == sorted(n["class_type"] for n in api.values())
