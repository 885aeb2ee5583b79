# The commands of DESIGN: each makes the environment first, if it is missing or out of date.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
# What the environment is made of: when it changes, the stamp has another name.
READY := $(VENV)/.ready-$(shell cat requirements.lock pyproject.toml | cksum | tr ' ' '-')
# The peers of two benchmarks, apart from everything else.
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready-$(shell cksum < tests/bench/requirements.lock | tr ' ' '-')
BASELINE := tests/contracts/baseline.binpb
IMAGE := proto/gen/tenfold/contracts.binpb
STOPPER := --stop-with-parent $$PPID

.PHONY: help up cluster test check stubs lock demo chaos clean baseline

help: ## say what can be made
	@sed -n 's/^\([a-z%-]*\):.*## /\1\t/p' Makefile | expand -t 12

up: $(READY) ## start the whole mesh here; Ctrl-C stops it
	@exec $(BIN)/tenfold up $(STOPPER) $(ARGS)

cluster: $(READY) ## the same on sharded Postgres; ARGS="--shards 2 --replicas 1"
	@exec $(BIN)/tenfold up --profile cluster $(STOPPER) $(ARGS)

# Files go out in the order of their paths, which has the long ones first and tests/unit last;
# xdist's own order, by the number of tests, ends with one worker that is busy and two that wait.
test: $(READY) ## run every test; no running service needed
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(READY) ## lint, types, import directions, contracts, stale stubs
	@echo "ruff: lint" && $(BIN)/ruff check --quiet .
	@echo "ruff: format" && $(BIN)/ruff format --check --quiet .
	@echo "mypy: strict types" && $(BIN)/mypy --no-error-summary
	@echo "import-linter: directions" && $(BIN)/lint-imports --no-logo 2>&1
	@echo "proto/gen: fresh" && $(BIN)/python proto/generate.py --check
	@echo "buf: contract lint" && $(BIN)/buf lint $(IMAGE) --config buf.yaml
	@echo "buf: nothing breaks the last release" && \
		$(BIN)/buf breaking $(IMAGE) --against $(BASELINE) --config buf.yaml
	@echo "All checks passed."

stubs: $(READY) ## regenerate proto/gen from the contracts
	@$(BIN)/python proto/generate.py

lock: $(READY) ## after a change of dependencies: pin them all, with hashes
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --extra dev pyproject.toml -o requirements.lock
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-index-url -c requirements.lock \
		tests/bench/requirements.in -o tests/bench/requirements.lock

baseline: $(READY) ## at a release: later contracts must not break these
	@cp $(IMAGE) $(BASELINE)

demo: $(READY) ## against a running mesh: the story of one user, narrated
	@exec $(BIN)/tenfold demo $(ARGS)

bench-%: $(READY) ## a benchmark; its last line is one JSON object
	@exec $(BIN)/python -m tests.bench.bench_$(subst -,_,$*) $(ARGS)

bench-edge bench-http: $(PEERS_READY)

chaos: $(READY) ## the long fault runs; the last line is one JSON object
	@exec $(BIN)/python -m tests.chaos.run $(ARGS)

clean: ## remove the environment and every cache; data folders stay
	@rm -rf $(VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(READY):
	@deploy/environment.sh $(VENV)
	@rm -f $(VENV)/.ready-* && touch $@

$(PEERS_READY): $(READY)
	@echo "Installing the peers of tests/bench/requirements.lock"
	@rm -rf $(PEERS)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes \
		--target $(PEERS) -r tests/bench/requirements.lock
	@touch $@
