"""The built-in families of models, one file each. Every `Architecture` in a file counts."""

from importlib import import_module
from pkgutil import iter_modules

from ..architecture import Architecture

_FILES = [import_module(f".{file.name}", __name__) for file in iter_modules(__path__)]
BUILT_IN = tuple(found for file in _FILES for found in vars(file).values() if isinstance(found, Architecture))
