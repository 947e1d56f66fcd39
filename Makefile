# The same commands for people and for CI. Each runs in the project's own .venv, which scripts/dev.sh makes when needed.
DEV := scripts/dev.sh
PYTEST := $(DEV) pytest
# Most of a test is waiting. Each worker has servers of its own; the tests of a file share them, and stay together.
WORKERS := 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-containers test-crash check format bench lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup:  ## make .venv from requirements.lock
	$(DEV)

demo:  ## run the demonstration
	$(DEV) coordinator demo

test: test-servers  ## run all tests, with servers from TEST_AMQP_URL and TEST_PG_URL, Docker, or this machine
	$(PYTEST) -n $(WORKERS) --dist loadfile

test-unit:  ## run the tests that need no server
	$(PYTEST) tests/unit

test-containers:  ## run the tests of bus, schema and store against containers, with a Docker daemon of their own if none runs
	scripts/containers.sh

.PHONY: test-servers
test-servers:
	@$(DEV) python -m tests.support.servers install

test-crash: test-servers  ## run the crash matrix in full, a minute of poison, 10,000 silent sagas, an upgrade of 1,000, a storm of timers, 100,000 random flows, a broker of three nodes, a broker that is killed 100 times
	CRASH_MATRIX=full POISON_SECONDS=60 SILENCE_SAGAS=10000 UPGRADE_SAGAS=1000 TIMER_STORM=100000 BROKER_KILLS=100 SAGA_EXAMPLES=100000 \
	  $(PYTEST) -n $(WORKERS) --dist loadfile tests/acceptance/test_crash_matrix.py tests/acceptance/test_poison.py tests/acceptance/test_silence.py \
	  tests/acceptance/test_upgrade.py tests/acceptance/test_timer_storm.py tests/nightly tests/unit/test_flow_properties.py \
	  tests/integration/test_broker_faults.py::test_f16_no_confirmed_message_is_lost_however_often_the_broker_is_killed_or_restarted

check:  ## lint, formatting, types, layers, purity
	$(DEV) ruff check
	$(DEV) ruff format --check
	$(DEV) mypy
	$(DEV) lint-imports
	$(DEV) python scripts/check_purity.py

format:  ## format the code, and repair what the linter can
	$(DEV) ruff format
	$(DEV) ruff check --fix

bench: test-servers  ## measure throughput and latency
	$(DEV) python -m benchmarks

lock:  ## write requirements.lock anew from pyproject.toml
	scripts/lock.sh

clean:  ## remove what the commands above have made
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .demo dist bench.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
