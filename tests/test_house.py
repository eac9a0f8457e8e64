"""The house: who may import whom, no circles, and sizes that keep the core readable in one sitting."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import kvlock_sampling as kv

PACKAGE = Path(kv.__file__).parent
ROOT = "kvlock_sampling"
FILES = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}
NAMES = {".".join(parts).removesuffix("__init__").rstrip("."): path for path, parts in FILES.items()}
WINGS = (  # other hosts, batches, and the web page: a new wing may add
    "attention.architectures.comfy",
    "attention.compat.comfy",
    "integrations.comfyui",
    "integrations.ray",
    "app.batch",
    "app.batch_command",
    "app.jobs",
    "app.costs",
    "app.plan_command",
    "app.report",
    "app.web",
    "search",
)
CORE = ("lock", "controller", "branches", "attention.hooks", "attention.context")
PURE = ("policy", "variance", "guidance", "attention.fuse", "masks")


@cache
def imports(name: str) -> frozenset[str]:
    """Absolute names of the modules that a module of the package imports, at its top or in a function."""
    path = NAMES[name]
    package = [ROOT, *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                found.add(submodule if submodule.removeprefix(ROOT + ".") in NAMES else module)
    return frozenset(found)


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def within(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    mine = {found.removeprefix(ROOT + ".") for found in imports(name) if found.startswith(ROOT + ".")}
    return {found for found in mine if found in NAMES} - {name}


@pytest.mark.parametrize("name", NAMES)
def test_import_rules(name):
    found, outside = within(name), {module.partition(".")[0] for module in imports(name)}
    for room in PURE:
        if inside(name, room):
            others = [other for other in PURE if other != room]
            assert not [module for module in found if any(inside(module, other) for other in others)], found
            assert not {"lock", "branches", "run", "settings"} & found
    if name.partition(".")[0] not in ("tiny", "integrations", "testing", "utils"):
        assert "diffusers" not in outside
    if name != "samplers":
        assert "k_diffusion" not in outside
    if not inside(name, "testing") and name:
        assert not [module for module in found if inside(module, "testing")]
    if name not in ("lock", "") and not inside(name, "integrations"):
        assert "branches" not in found  # only the lock knows the order of the picture


def test_there_is_no_import_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(within(name) - {""}):
                visit(other, (*path, name))
            done.add(name)

    for name in NAMES:
        visit(name, ())


def test_sizes():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in NAMES.items()}
    core = [name for name in lines if not name.startswith(WINGS)]
    trees = [ast.parse(NAMES[name].read_text(encoding="utf-8")) for name in core]
    assert sum(lines[name] for name in core) <= 13_762
    assert sum(isinstance(node, ast.ClassDef) for tree in trees for node in ast.walk(tree)) <= 120
    assert max(lines.values()) <= 350
    assert sum(lines[name] for name in CORE) < 1000
    assert len([parts for parts in FILES.values() if len(parts) == 1]) <= 18
    assert len(kv.__all__) <= 26


def test_weights_and_pictures_stay_small():
    root = PACKAGE.parent
    folders = [root / name for name in ("kvlock_sampling", "benchmarks", "comfyui", "docs")]
    binaries = [p for folder in folders for p in folder.rglob("*.*") if p.suffix in (".png", ".jpg", ".safetensors")]
    assert sum(path.stat().st_size for path in binaries) < 16_000_000
