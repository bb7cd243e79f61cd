# Everything here works on a fresh clone: the first target that needs it makes .venv and installs into it.
# Another Python: make demo PYTHON=/path/to/python3.12

PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# What `make bench` runs, in this order, and where: make bench BENCH_PLATFORM=gpu BENCH_ARGS="--scale 8"
BENCHMARKS := $(wildcard $(patsubst %,benchmarks/%.py,dormant seed_cost loop observation telemetry compile_time growth_stall))
# bridge.py needs torch and runs by itself: $(BIN)/python benchmarks/bridge.py --platform cpu --json benchmarks/results/cpu/bridge.json
# So do convolutions.py (a minute) and instructions.py (valgrind and a quarter of an hour).
BENCH_PLATFORM ?= cpu
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test quick-code lint bench gromo clean

help: ## say what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

demo: $(VENV)/.demo ## grow a network on handwritten digits (under 3 minutes after installation)
	@$(BIN)/esper-jax train --task digits

# Compilers take most of the suite's time, for programs that then run for microseconds. All tests together are compiled
# quickly and each program once (jaxlib 0.12 has no --xla_cpu_use_fusion_emitters); then those that are about bits run
# what users run: a loop's, which no other code keeps, and isolation's on the MLP.
DEFAULT_CODE := tests/tolaria/test_loop.py
QUICK_CODE := --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1
test: $(VENV)/.dev ## run all tests (make test ARGS="-k tasks -n 0")
ifeq ($(strip $(ARGS)),)
	@compiled="$$(mktemp -d)"; trap 'rm -rf "$$compiled"' EXIT; \
	export JAX_COMPILATION_CACHE_DIR="$$compiled"; \
	export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1; \
	quick="$(QUICK_CODE)"; \
	case "$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("jaxlib"))')" in \
		0.10.*) quick="$$quick --xla_cpu_use_fusion_emitters=false";; esac; \
	XLA_FLAGS="$$XLA_FLAGS $$quick" \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(DEFAULT_CODE:%=--ignore=%) && \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(DEFAULT_CODE) tests/kasmina/test_isolation.py -k "test_loop or mlp"
else
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)
endif

quick-code:
	@echo "$(QUICK_CODE)"

lint: $(VENV)/.dev ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.dev ## run the small set of benchmarks (under 10 minutes) and write benchmarks/RESULTS.md
	@set -e; for script in $(BENCHMARKS); do \
		echo "== $$script"; \
		$(BIN)/python "$$script" --platform $(BENCH_PLATFORM) $(BENCH_ARGS) \
			--json "benchmarks/results/$(BENCH_PLATFORM)/$$(basename "$$script" .py).json"; \
	done
	@$(BIN)/python benchmarks/report.py

gromo: ## install GroMo and torch into .venv-gromo, for one row of a benchmark
	@$(PYTHON) -m venv .venv-gromo
	@.venv-gromo/bin/python -m pip install --quiet --disable-pip-version-check numpy torch==2.13.0
	@.venv-gromo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gromo==0.1.0

clean: ## remove what was built and cached; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "esper_jax needs Python 3.11 or newer and found none: install one, or name it with PYTHON=..." >&2; exit 2; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "esper_jax needs Python 3.11 or newer; $(PYTHON) is not: name another with PYTHON=..." >&2; exit 2; }
	@echo "making $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing esper_jax[cli,tasks,plot] into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli,tasks,plot]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing esper_jax[dev,bridge-dev] into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,bridge-dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/bridge/clients.txt
	@touch $@ $(VENV)/.demo
