# No separate set-up: `make demo` and `make test` create .venv and install the dependencies.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# tests of a file run in one process, because they share slow fixtures
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo demo-data demo-video demo-vlm test test-slow test-lowest lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       render a world, train and test VL-PET-large on it: 4 to 9 minutes on 2 cores"
	@echo "make demo-data  only the demo's world, features and language model, for sweeps with --demo: about 2 minutes"
	@echo "make demo-video the same for four video-text tasks: about 7 minutes"
	@echo "make demo-vlm   a small SmolVLM: VL-PET-large, LoRA, the projector alone and a blind control: about 10 minutes"
	@echo "make test       lint, type checks and the fast tests"
	@echo "make test-slow  all tests, including slow ones"
	@echo "make test-lowest the fast tests against the lowest versions that setup.cfg admits (7 GB: torch with CUDA)"
	@echo "make format     apply ruff's fixes and formatting"

# .venv is rebuilt when a dependency file changes
.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"Python 3.10 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: use make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: .venv/installed lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL)

test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[dev]'
	.venv-lowest/bin/python -m pytest $(PARALLEL) -m "not slow"

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python experiments/demo.py

demo-data: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python experiments/demo.py --data

demo-video: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python experiments/demo_video.py

demo-vlm: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python experiments/demo_vlm.py

clean:
	rm -rf runs data wandb .pytest_cache .mypy_cache .ruff_cache
