"""The recipes of policies/recipes, loaded by name."""

import importlib.util
import sys
from pathlib import Path

RECIPES = sorted((Path(__file__).parent.parent / "policies" / "recipes").glob("*.py"))


def load(name):
    path = next(p for p in RECIPES if p.stem == name)
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
