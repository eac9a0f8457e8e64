"""The families of models that are known without being told: one declaration per file."""

from . import wan

BUILT_IN = (wan.ARCHITECTURE,)
