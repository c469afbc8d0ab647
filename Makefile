# Two commands matter to a newcomer: `make demo` and `make test`. Each makes .venv first if needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Exported for pip's isolated build environment too, so that Cython and numpy are pinned there as well.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*) $(wildcard sysmt/hw/*.pyx)
C_FILES := $(wildcard csrc/*.c) $(wildcard csrc/*.h)

.PHONY: help demo test install lint format sanitize bench rtl docs clean constraints

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(INSTALLED)  ## the main job on the embedded digits: a table, a curve, files in ./results/demo
	$(BIN)/sysmt run --threads 1,2,4 --recalibrate ema --out results/demo --overwrite

test: $(INSTALLED)  ## all tests
	$(BIN)/python -m pytest

install: $(INSTALLED)  ## .venv with pinned dependencies and the package, editable

$(INSTALLED): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sysmt needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

lint: $(INSTALLED)  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

format: $(INSTALLED)  ## rewrite sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

sanitize: $(INSTALLED)  ## the kernels' tests under ASan + UBSan, and valgrind where it is installed
	PYTHON=$(CURDIR)/$(BIN)/python tests/sanitize.sh

bench: $(INSTALLED)  ## speed against the targets; tables, CSV and plots in ./results/bench
	$(BIN)/python benchmarks/speed.py --out results/bench

rtl: $(INSTALLED)  ## lint, simulate, mutate and synthesise the Verilog; needs verilator, iverilog, yosys
	$(MAKE) -C rtl PYTHON=$(CURDIR)/$(BIN)/python

docs: $(INSTALLED)  ## the site, warnings are errors: docs/_build/html/index.html
	rm -rf docs/api
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

constraints: $(INSTALLED)  ## pin what is installed now
	{ echo '# Every version that make demo, make test and CI install. Refresh: make constraints'; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## remove what was built, not .venv
	rm -rf build docs/_build docs/api *.egg-info sysmt/hw/*.so
