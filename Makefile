# Every entry point makes its own environment first; the second time that takes no time.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check slow chaos bench compiled protos venv venv-test

help:
	@echo "make demo    start a small cluster on this machine and talk to it"
	@echo "make test    all tests that take seconds"
	@echo "make check   formatting, lint, types, protocol compatibility"
	@echo "make slow    the tests that take minutes"
	@echo "make chaos   load while processes are killed, for MINUTES=10 and a bit; the paced engine, then a real one"
	@echo "make bench   the quick form of every benchmark"
	@echo "make compiled  the simulator and its machines through a C compiler, into build/compiled"
	@echo "make protos  generate the gRPC stubs anew"

venv:
	@$(PYTHON) deploy/bootstrap.py --extra http --extra grammar

venv-test:
	@$(PYTHON) deploy/bootstrap.py --extra http --extra grammar --extra test

demo: venv
	@$(BIN)/python -m control.demo

# Deployments have the machine to themselves; all else runs two tests at a time.
test: venv-test
	@$(BIN)/python -m pytest -n 2 -m "not slow and not live"
	@$(BIN)/python -m pytest -m "live and not slow"

slow: venv-test
	@$(BIN)/python -m pytest -n 2 -m "slow and not live" --timeout 1800
	@$(BIN)/python -m pytest -m "slow and live" --timeout 1800

chaos: venv-test
	$(BIN)/python -m bench.chaos --minutes $(or $(MINUTES),10)

check: venv-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m deploy.protos check

bench: venv-test
	@for file in bench/*.py; do \
	  name=$$(basename $$file .py); \
	  if grep -q '^def main' $$file; then $(BIN)/python -m bench.$$name --quick || exit 1; fi; \
	done

compiled: venv-test
	@$(BIN)/python -m deploy.compiled

protos: venv-test
	@$(BIN)/python -m deploy.protos generate
