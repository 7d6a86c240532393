# Needs only python3 (3.11 or newer), pip and make. Everything else goes into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup quickstart test test-models lint format bench bench-full docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv with everything that the tests and the bundled servers need

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes, mostly downloads)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[grpc,triton,torchserve,train,dev]'
	@touch $@

quickstart: $(STAMP) ## host the digits model on a real Triton and load-test it (about half a minute)
	@$(BIN)/servebench run digits-triton-http

test: $(STAMP) ## run all tests but those of the large models
	@$(BIN)/python -m pytest

test-models: $(STAMP) ## host every model on both servers and compare its answers (some minutes)
	@$(BIN)/python -m pytest -m "models or small_models"

lint: $(STAMP) ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## apply the code style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## measure the client beside its peers, in minutes (apt install nginx-light nghttp2 wrk hey)
	@$(BIN)/python -m benchmarks.run_all --quick

bench-full: $(STAMP) ## the same with repeats: the figures of docs/performance.md
	@$(BIN)/python -m benchmarks.run_all

docs: $(STAMP) ## rewrite the profile reference in README.md from the schema
	@$(BIN)/python docs/profile_table.py README.md

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build dist
