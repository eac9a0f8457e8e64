# Each command makes .venv and installs into it if that is needed, then does its job.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow install lint docs site benchmark

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## edit five clips in three ways; writes demo/
	$(BIN)/kvlock demo --out demo

test: $(READY)  ## all tests but the slow ones; ARGS="-n 2" for two processes
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(READY)  ## the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

install: $(READY)  ## .venv with everything in it

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## run every code block of the docs, check every link, build the site
	$(BIN)/python -m pytest tests/test_docs.py
	$(MAKE) site

site: $(READY)  ## build the documentation into site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

benchmark: $(READY)  ## the table of README.md, about two hours; ARGS="--edits 20" for a look
	$(BIN)/python benchmarks/release.py --bfloat16 $(ARGS)

# torch goes first and alone, so that what comes after finds it there and leaves it alone.
$(READY): pyproject.toml constraints.txt
	@set -e; \
	fits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, int(sys.argv[1])))' $$2 2>/dev/null; }; \
	python=; \
	for candidate in $(PYTHON) python3.12 python3.11; do \
	  if fits $$candidate 12; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ] && fits $(PYTHON) 99; then \
	  python=$(PYTHON); \
	  echo "note: k-diffusion cannot be installed on $$($$python --version), so there are no samplers by name;" \
	    "python3.12 or python3.11 was not found." >&2; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "kvlock_sampling needs Python 3.11 or 3.12; $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
	  echo "  Name another one: make install PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
