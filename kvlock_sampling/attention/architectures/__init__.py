"""The built-in families of models: one file with a constant `ARCHITECTURE` each."""

from importlib import import_module
from pkgutil import iter_modules

from ..architecture import Architecture

BUILT_IN: tuple[Architecture, ...] = tuple(
    import_module(f".{family.name}", __name__).ARCHITECTURE for family in iter_modules(__path__)
)
