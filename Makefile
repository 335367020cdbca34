# The front door.  Every target sets up what it needs, once: an environment in .venv from constraints.txt.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HOME_DIR ?= .streamlearn
ARGS ?=

.PHONY: help setup run test quick check bench secrets compose-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## the environment (the other targets do this by themselves)

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamlearn needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.ready: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(VENV)/.base  ## the living loop on the demo world; Ctrl-C ends it, the next run goes on
	$(BIN)/streamlearn up --demo --home $(HOME_DIR) $(ARGS)

test: $(VENV)/.ready  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

quick: $(VENV)/.ready  ## the suite without the tests marked slow, while you work
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' $(ARGS)

check: $(VENV)/.ready  ## lint, types, formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready  ## benchmarks: one training step, ingest
	$(BIN)/python -m bench.step
	$(BIN)/python -m bench.ingest

secrets:  ## random secrets for docker-compose.yml, into ops/docker/secrets; what is there stays
	$(PYTHON) ops/docker/make_secrets.py

compose-check: $(VENV)/.ready  ## docker-compose.yml: its schema, and its parts against each other
	$(BIN)/python -m ops.docker.check

clean:  ## remove the environment (not the learner's home)
	rm -rf $(VENV) build *.egg-info
