# `make` lists the targets. demo and test each make their own environment first.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= cpu,digits,dev
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Two processes, one file at a time each, Ray's files first: starting Ray's processes is mostly waiting.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo demo-fast serve test test-all check audit fmt bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV): about 6 GB and 3 minutes with a warm package cache"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@# Peers of two tests. Without their other dependencies: they would slow down every import of open_clip.
	$(BIN)/python -m pip install --quiet --no-deps "clip-benchmark==1.6.2" "clip-retrieval==2.45.0"
	@touch $(READY)

install: $(READY) ## make the environment (.venv) and install everything

demo: $(READY) ## the miniature study: a report in 20 minutes on two cores
	$(BIN)/clipgap demo --out demo
	@echo; echo "report: $(CURDIR)/demo/report/index.html      next: make serve"

demo-fast: $(READY) ## the tiny world: a report in 3 minutes
	$(BIN)/clipgap demo --fast --out demo-fast
	@echo; echo "report: $(CURDIR)/demo-fast/report/index.html"

serve: $(READY) ## search and zero-shot over the demo's pool, on http://127.0.0.1:8000
	$(BIN)/clipgap serve --index miniature=demo/index --model conv-64 --pretrained demo/runs/full-with-reference-s0 \
	  --scores demo/scores --splits demo/splits/*.npy

test: $(READY) ## everything fast, and one kill-and-resume test per stage
	$(PYTEST) -m "not cluster and not slow and not gpu" --durations=10

test-all: $(READY) ## everything: cluster, whole studies, browser (installs Debian's chromium and redis-server when it can)
	@{ command -v chromium && command -v redis-server; } >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y chromium redis-server; } || true
	CLIPGAP_ALL=1 $(PYTEST) --durations=20

check: $(READY) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: ## before a release: known vulnerabilities of the pinned versions (asks the advisory database; own environment)
	$(PYTHON) -m venv .audit && .audit/bin/pip install --quiet pip-audit
	.audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt
	rm -rf .audit

fmt: $(READY) ## format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## programs that measure us beside a peer in one run
	for program in benchmarks/*.py; do $(BIN)/python $$program || exit 1; done

clean: ## remove the environment and the demo's output
	rm -rf $(VENV) .audit demo demo-fast
