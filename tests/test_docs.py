"""The docs are true: every Python block runs, every link and command line exists, every public name is documented.

A block after the comment `<!-- skip: reason -->` is compiled and not run. A comment that begins with `<!-- run:` holds
code that runs and is not shown. Blocks of one file share their names, and run in order in an empty folder.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
import sys
import types
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pytest
import torch
import typer
from typer.testing import CliRunner

import kvlock_sampling as kv
from kvlock_sampling.app.cli import app

ROOT = Path(__file__).resolve().parent.parent
API = sorted(ROOT.glob("docs/api/*.md"))
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "policies/README.md", "benchmarks/measured.md")
PAGES = [*(ROOT / page for page in OUTSIDE), *sorted(ROOT.glob("docs/*.md")), *API]
PUBLIC = (
    "kvlock_sampling",
    *(f"kvlock_sampling.{name}" for name in ("attention", "denoisers", "kv_cache", "masks", "policy", "presets")),
    *(f"kvlock_sampling.{name}" for name in ("samplers", "testing", "types", "variance", "video", "app", "tiny")),
    "kvlock_sampling.integrations.comfyui",
    "kvlock_sampling.integrations.diffusers",
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SKIP = re.compile(r"<!--\s*skip:\s*\S.*-->\s*$")
# Modules whose import is an action.
MODULES = [m.name for m in pkgutil.walk_packages(kv.__path__, "kvlock_sampling.") if not m.name.endswith("__main__")]


class Block(NamedTuple):
    """Code between two fences. line: of the opening fence, from 1. skipped: a comment says not to run it."""

    language: str
    code: str
    line: int
    skipped: bool


def blocks(page: Path) -> Iterator[Block]:
    before, end, opened = "", "```", None
    code: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None and line.startswith(("```", "<!-- run:")):
            language = line[3:].strip() if line.startswith("`") else "python"
            opened, code = Block(language, "", number, bool(SKIP.search(before))), []
            end = "```" if line.startswith("`") else "-->"
        elif opened is not None and line.startswith(end):
            yield opened._replace(code="\n".join(code))
            opened, before = None, ""
        elif opened is not None:
            code.append(line)
        elif line.strip():
            before = line.strip()
    assert opened is None, f"{page.name}: the fence of line {opened.line} is never closed"


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "``", text)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    torch.manual_seed(0)
    module = types.ModuleType("__docs__")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page):
        if block.language == "python":
            # Padded, so that a traceback names the line of the page.
            compiled = compile("\n" * block.line + block.code, str(page), "exec")
            if not block.skipped:
                exec(compiled, vars(module))
    for name, value in list(vars(module).items()):
        if name.startswith("test_") and callable(value):
            value()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_import_of_the_package_exists(page: Path) -> None:
    """Also in blocks that are not run. No page imports from deeper than one level."""
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvlock_sampling"):
                assert (node.module or "").count(".") <= 1, f"{page.name}, block of line {block.line}: {node.module}"
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), (page.name, block.line, node.module)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kv":
                assert hasattr(kv, node.attr), f"{page.name}, block of line {block.line}: kv.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_and_picture_exists(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    for target in targets:
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = page if not path else page.parent / path
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}; there are {sorted(anchors(file))}"


@pytest.mark.parametrize("page", ["docs/ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_on_the_map_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`([\w./-]+(?:/|\.py|\.md|\.toml))`", text):
        assert (ROOT / name).exists() or (ROOT / "kvlock_sampling" / name).exists(), name


def test_the_life_of_one_call_visits_each_file_once() -> None:
    text = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| \d+ \| `([\w/.]+)` \| `(?:\w+\.)?(\w+)` \|", text, flags=re.MULTILINE)
    files = [file for file, _ in steps]
    assert len(steps) == len(set(files)) <= 8
    for file, function in steps:
        assert f"def {function}(" in (ROOT / "kvlock_sampling" / file).read_text(encoding="utf-8"), function


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def entries() -> list[str]:
    """What the API pages document."""
    return [name for page in API for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)]


def resolved(name: str) -> Any:
    """The object of a dotted name. A function may have the name of the module that defines it."""
    module, _, rest = name.rpartition(".")
    while module not in ("kvlock_sampling", *MODULES):
        module, _, last = module.rpartition(".")
        rest = f"{last}.{rest}"
    return attrgetter(rest)(importlib.import_module(module))


def public(module: types.ModuleType) -> list[str]:
    """The names of `__all__`, or else the functions and classes that a module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return [n for n in own if n[0] != "_" and (inspect.isclass(vars(module)[n]) or inspect.isfunction(vars(module)[n]))]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_on_an_api_page(name: str) -> None:
    module = importlib.import_module(name)
    documented = {id(resolved(entry)) for entry in entries()}
    values = {public_name: getattr(module, public_name) for public_name in public(module)}
    missing = [n for n, value in values.items() if id(value) not in documented and not inspect.ismodule(value)]
    assert not missing, f"add to docs/api: {', '.join(missing)}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as they read in a link."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_line_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for block in blocks(page):
        if block.language not in ("bash", "sh", "console"):
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert {w for w in words[1:] if "=" not in w} <= set(targets), line
            if words[:1] == ["kvlock"]:
                check_command(words[1:])


def check_command(words: list[str]) -> None:
    """Every option exists and gets its value, and no argument is missing: the words parse. Nothing runs."""
    group: Any = typer.main.get_command(app)
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        assert set(words) <= {"--help"}, words
        return
    assert name in group.commands, f"kvlock {name} does not exist; there are {', '.join(group.commands)}"
    help_text = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
    assert help_text.exit_code == 0
    command = group.commands[name]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, f"kvlock {name} has no option {word}; it has {sorted(known)}"
    with command.make_context(name, [word for word in words if word != name]):
        pass


@pytest.mark.parametrize("name", ["kvlock_sampling", *MODULES])
def test_doctests(name: str) -> None:
    module = importlib.import_module(name)
    torch.manual_seed(0)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, extraglobs={"kv": kv, "torch": torch})
    assert result.failed == 0


def test_the_checks_find_mistakes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- run:\nx = 1\n-->\n<!-- skip: no GPU -->\n```python\n1 / 0\n```\n[b](c.md#d) `[e](f)`\n")
    assert [(b.code, b.line, b.skipped) for b in blocks(page)] == [("x = 1", 2, False), ("1 / 0", 6, True)]
    with pytest.raises(AssertionError, match=r"c\.md"):
        test_every_link_and_picture_exists(page)
    page.write_text("```python\nfrom kvlock_sampling.app.calibration import scenes\n```\n")
    with pytest.raises(AssertionError, match=r"app\.calibration"):
        test_every_import_of_the_package_exists(page)
    check_command(["edit", "c.mp4", "--mask", "m.png", "--prompt", "a red circle", "-o", "out.mp4"])
    with pytest.raises(AssertionError, match="no option --polcy"):
        check_command(["edit", "c.mp4", "--polcy", "paper"])
    with pytest.raises(AssertionError, match="does not exist"):
        check_command(["edti"])
