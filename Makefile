# The whole developer loop. `make demo` and `make test` do everything on a fresh Debian 12 or Ubuntu 24.04:
# system packages, .venv, pinned Python packages, then the job. Once that is in place they go straight to the job.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster lint bench picture clean

# What is passed on to the job: make demo ARGS="data.source=/path/to/images", make test ARGS="-k pgd"
ARGS ?=
# The interpreter of .venv: make setup PYTHON=python3.12; default: what is there, or the first 3.11 or 3.12 found.
PYTHON ?=
export PYTHON

BIN := .venv/bin
# Tests wait for other processes half of the time: a process of pytest per core, four at most, handed one file after
# the other (tests/conftest.py). ARGS="-n 0" has one alone.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## /  make \1\t/p' Makefile | expand -t 22

setup:  ## system packages, .venv and the pinned Python packages; the other targets call it
	@.ci/setup

demo: setup  ## the main job in small: trains, evaluates, writes runs/demo/report.html
	@exec $(BIN)/arae demo $(ARGS)

test:  ## the test suite, without the tests that need a cluster
	@.ci/setup --tests
	@exec $(BIN)/python -m pytest -m "not cluster" $(PARALLEL) $(ARGS)

test-cluster:  ## the slow tests: several hosts, killed workers and nodes, object storage, outages
	@.ci/setup --tests
	@exec $(BIN)/python -m pytest -m cluster tests/cluster $(PARALLEL) $(ARGS)

lint: setup  ## ruff and pyright, as the commit hooks run them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup  ## the benchmarks
	@cmp -s benchmarks/peers.txt .peers/peers.txt || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target .peers -r benchmarks/peers.txt && cp benchmarks/peers.txt .peers || true
	@test -d .peers/adv_robust_autoencoder/.git || { rm -rf .peers/clone; GIT_TERMINAL_PROMPT=0 git clone -q https://github.com/renanrojasg/adv_robust_autoencoder .peers/clone && git -C .peers/clone checkout -q 0ab709d4ed3038f516d562f2adcda6eb8ce88d80 && rm -rf .peers/adv_robust_autoencoder && mv .peers/clone .peers/adv_robust_autoencoder; } || true
	@exec $(BIN)/python -m benchmarks $(ARGS)

picture: setup  ## the README's pictures and table, from the demo's run
	@$(BIN)/python -m benchmarks.readme runs/demo

clean:  ## removes .venv, .peers and the tools' caches; runs and data stay
	rm -rf .venv .peers .pytest_cache .ruff_cache build dist arae.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
