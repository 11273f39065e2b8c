# The two commands of the README: `make demo` and `make test`. Each sets up what it needs.
SHELL := /bin/bash
PYTHON := .venv/bin/python
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: demo test test-kernels check soak bench format native setup clean

demo:
	@scripts/setup demo
	@scripts/demo

test:
	@scripts/setup test
	@$(PYTHON) scripts/suites.py

test-kernels:
	@scripts/setup test
	@$(PYTHON) scripts/test_kernels.py

check:
	@scripts/setup check
	@$(PYTHON) scripts/suites.py house unit

soak:
	@scripts/setup test
	@BULKHEAD_TEST_SCALE=$${BULKHEAD_TEST_SCALE:-10} $(PYTHON) scripts/suites.py --no-budget

bench:
	@scripts/setup test
	@$(PYTHON) -m bench

format:
	@scripts/setup check
	@$(PYTHON) -m ruff check --fix --quiet . ; $(PYTHON) -m ruff format --quiet .

native:
	@$(MAKE) -s -C native

setup:
	@scripts/setup test

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis
