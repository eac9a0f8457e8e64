"""The checker that conftest installs: shapes and types in signatures are enforced while the tests run."""

from beartype import BeartypeConf, beartype

# An int is a float to Python's own typing (PEP 484), so it is one here.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
