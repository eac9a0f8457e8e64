"""Optional packages: imports stay light without them, and whatever needs one names the extra to install."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from kvlock_sampling.types import KVLockError
from kvlock_sampling.utils.extras import hide_broken_torchvision, require

EXTRAS = ("accelerate", "av", "diffusers", "gradio", "matplotlib", "PIL", "ray", "rich", "transformers", "typer")


def run(code: str, *words: str, hide: tuple[str, ...] = EXTRAS) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter in which the packages of `hide` cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({hide!r}))\n{code}"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


def test_importing_every_light_module_imports_nothing_heavy() -> None:
    done = run(
        f"""
import kvlock_sampling as kv
import kvlock_sampling.app.edit, kvlock_sampling.app.models, kvlock_sampling.tiny, kvlock_sampling.video.metrics
from kvlock_sampling import tiny
tiny.render([tiny.sample_scene(0)])
kv.samplers.flow_sigmas(3), kv.testing
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(loaded & {{*{EXTRAS!r}, "k_diffusion", "torchvision"}}))
print([name for name in ("scipy.optimize", "scipy.stats", "scipy.interpolate") if name in sys.modules])
""",
        hide=(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


NEEDS = {
    "the embedded model": ("kvlock_sampling.tiny.load()", "diffusers"),
    "reading a film": ("video.read_clip('clip.mp4')", "video"),
    "reading an image": ("video.read_mask('mask.png', frames=1, size=(4, 4))", "video"),
    "writing a film": ("video.write_clip('out.mp4', clip)", "video"),
    "writing a gif": ("video.write_clip('out.gif', clip)", "video"),
    "writing a sheet": ("video.write_clip('out.png', clip)", "video"),
    "labels": ("video.side_by_side([clip], ['a'])", "video"),
    "the web page": ("kvlock_sampling.app.web.serve()", "web"),
    "a figure": ("kvlock_sampling.trace.Trace().plot('run.png')", "plot"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_needs_an_extra_names_it(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("clip.mp4", "mask.png"):
        (tmp_path / file).touch()
    call, extra = NEEDS[name]
    done = run(
        f"""
import torch, kvlock_sampling.app.web, kvlock_sampling.tiny, kvlock_sampling.video.metrics
from kvlock_sampling import KVLockError, video
clip = torch.zeros(3, 2, 8, 8)
try:
    {call}
except KVLockError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert f"pip install 'kvlock-sampling[{extra}]'" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "mask.png"]


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_without_its_packages_is_one_line(missing: str) -> None:
    done = run("from kvlock_sampling.app.__main__ import main; main()", "demo", hide=(missing,))
    assert done.returncode == 1
    assert done.stderr == f"kvlock needs {missing}, which is not installed: pip install 'kvlock-sampling[all]'\n"


@pytest.mark.parametrize(("missing", "extra"), [("diffusers", "diffusers"), ("av", "video"), ("matplotlib", "plot")])
def test_the_demo_names_a_missing_extra_before_it_makes_a_folder(missing: str, extra: str, tmp_path) -> None:
    code = "from kvlock_sampling.app.__main__ import main; sys.argv[0] = 'kvlock'; main()"
    done = run(code, "demo", "--out", str(tmp_path / "shown"), hide=(missing,))
    assert done.returncode == 2
    assert f"pip install 'kvlock-sampling[{extra}]'" in done.stderr
    assert not (tmp_path / "shown").exists()


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        require("half_there", "video")
    with pytest.raises(KVLockError, match=r"this needs nowhere, which is not installed"):
        require("nowhere.at.all", "video")
    assert require("json.decoder", "video").JSONDecoder


@pytest.mark.parametrize(
    ("content", "seen"), [("", True), ("raise RuntimeError('no operator torchvision::nms')", False)]
)
def test_only_a_broken_torchvision_looks_absent(tmp_path, monkeypatch, content, seen):
    (tmp_path / "torchvision.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    try:
        hide_broken_torchvision()
        hide_broken_torchvision()  # once hidden, it stays so
        assert (find_spec("torchvision") is not None) == seen
    finally:
        sys.modules.pop("torchvision", None)
