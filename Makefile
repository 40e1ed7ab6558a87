# `make demo`, `make test`, and `make results` for docs/results.md. All set up .venv by themselves.
PYTHON ?= python3.11
ifeq (,$(shell command -v $(PYTHON) 2>/dev/null))
PYTHON := python3
endif
VENV := .venv
RUN := $(VENV)/bin/python
# Spinning OpenMP threads cost a multiple on shared cores.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test results lint format clean

demo: $(VENV)/ready
	$(RUN) -m demo --output demo/output

test: $(VENV)/ready
	$(RUN) -m pytest

results: $(VENV)/ready
	$(RUN) -m benchmarks.report

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch first and by itself: pinned, it is a CPU build where one is on offer.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo/output
