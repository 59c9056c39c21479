# Two targets do all the set-up on a fresh machine: `make demo` runs the whole chain, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 3000
export DAGSTER_HOME := $(CURDIR)/dagster_home

.PHONY: help demo test dev bench lint slurm-up slurm-down slurm-soak clean-demo
.DEFAULT_GOAL := help

help:
	@echo "make demo    write a small city and materialize every asset: tars to model, report and vectors"
	@echo "make dev     the Dagster UI and daemon on http://127.0.0.1:$(PORT), the report on http://127.0.0.1:3001"
	@echo "make test    the test suite with coverage"
	@echo "make bench   every stage beside its reference method"
	@echo "make lint    ruff, mypy, import contracts"
	@echo "make slurm-soak   300 jobs on that SLURM while workers, tasks and daemons are killed"
	@echo "make slurm-up, make slurm-down   a real SLURM on this machine, as the tests use it (Debian, root)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version); try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m spatial_assets.demo

dev: $(VENV)/.installed
	@$(if $(wildcard .env),$(BIN)/dotenv run --) $(BIN)/spatial report & page=$$!; \
		trap "kill $$page 2>/dev/null || true" EXIT INT TERM; \
		$(BIN)/dagster dev -w workspace.yaml -h 127.0.0.1 -p $(PORT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m tests.run $(PYTEST_ARGS)

slurm-up: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.slurm.cluster up

slurm-soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.slurm.soak $(SOAK_ARGS)

slurm-down: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.slurm.cluster down

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.run_all $(BENCH_ARGS)

clean-demo:
	rm -rf data dagster_home/storage dagster_home/history dagster_home/schedules dagster_home/logs
