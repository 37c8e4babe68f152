# Needs git, make, Python 3.11+ and a package registry; no root. Everything is installed into .venv.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# `make PYTHON=/path/to/python3.12` picks one; otherwise the first of these that is new enough.
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
# Of the quick start: weights, latents and the parties' shares.
SEED := 0
# One thread a process: ranks of the distributed tests share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help .venv quickstart lint typecheck test test-all wheel clean

help: ## print the targets
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(STAMP) ## create .venv and install the package with its extras and tools

$(BIN)/python:
	@for python in $(PYTHONS); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			"$$python" -m venv --clear $(VENV) && exit 0; \
			echo "error: '$$python -m venv $(VENV)' failed; on Debian and Ubuntu the module is in the package python3-venv" >&2; \
			exit 1; \
		fi; \
	done; \
	echo "error: no Python 3.11 or newer among: $(PYTHONS). Name one with 'make PYTHON=/path/to/python3.12 ...'" >&2; \
	exit 1

# uv and not pip, where it can be had: it resolves the same versions everywhere, whatever local wheel folders pip is told of.
$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet -c constraints.txt uv || true
	@if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
		$(BIN)/python -m uv pip install --python $(BIN)/python -c constraints.txt -e '.[all,dev]'; \
	else \
		echo "warning: pip could not install uv (its message is above); installing with pip, which is slower" >&2; \
		$(BIN)/python -m pip install -c constraints.txt -e '.[all,dev]'; \
	fi
	@$(BIN)/python -c 'import torch, torchvision' || { \
		echo "error: torch and torchvision in $(VENV) do not fit each other; remove $(VENV) and see that both come from one registry" >&2; \
		exit 1; }
	@touch $@

quickstart: $(STAMP) ## train two small teachers and fuse them into a student, on two processes of this machine
	$(BIN)/dfkd teachers train configs/quickstart/teachers.yaml seed=$(SEED) split.seed=$(SEED) --overwrite
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 launch/train.py \
		configs/quickstart/dfmf.yaml seed=$(SEED) --overwrite

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .

typecheck: $(STAMP) ## mypy
	$(BIN)/mypy

test: lint typecheck ## lint, types and every test that is not marked slow
	$(PYTEST) -m "not slow"

test-all: lint typecheck ## lint, types and every test
	$(PYTEST)

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m uv build --wheel --out-dir dist

clean: ## remove what was built and the tools' caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
