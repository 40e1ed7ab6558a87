# `make demo`, `make test`, and `make results` for docs/results.md and docs/results/. All set up .venv by themselves.
PYTHON ?= python3.11
ifeq (,$(shell command -v $(PYTHON) 2>/dev/null))
PYTHON := python3
endif
VENV := .venv
TOOLS := .venv-tools
LOCK := requirements-dev.txt
CPU_LOCK := requirements-cpu.txt
TOOLS_LOCK := requirements-tools.txt
RUN := $(VENV)/bin/python
WORKERS ?= 2  # processes that test; more than there are cores disturb each other
INSTALL := pip install --quiet --require-hashes --no-deps --no-build-isolation
COMPILE = $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-annotate --custom-compile-command 'make lock' $(UPGRADE)
# Spinning OpenMP threads cost a multiple on shared cores.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo demo-docs test architectures cpus matrix gpu results chaos soak fuzz distributed lint format lock sbom audit clean wheel

demo: $(VENV)/ready
	$(RUN) -m demo --output demo/output

# The result of the last `make demo` for docs and README.
demo-docs: $(VENV)/ready
	cp demo/output/result.json docs/demo.json
	cp demo/output/result.png docs/demo.png
	$(RUN) -m benchmarks.report

test: $(VENV)/ready
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile

# The suite with the kernels of other CPUs, and with two threads; ARGS="--short" for what CI runs.
cpus: $(VENV)/ready
	$(RUN) -m benchmarks.cpus $(ARGS)

# `prepare` as a whole on every architecture that works; `make test` has it on some.
architectures: $(VENV)/ready
	FOLORA_TEST_ARCHITECTURES=1 $(RUN) -m pytest tests/adapters/test_architectures.py

# The wheel with other versions of what it stands on: many downloads. One: make matrix ARGS=axolotl
matrix: $(VENV)/ready $(TOOLS)/ready
	$(RUN) -m benchmarks.matrix $(ARGS)

# What can only be seen on a GPU; `make test` hides it, and compares with what the CPU gives.
gpu: $(VENV)/ready
	FOLORA_TEST_GPU=1 $(RUN) -m pytest tests/test_cuda.py

results: $(VENV)/ready
	$(RUN) -m benchmarks.report

# Bounded in time and count; for example: make chaos ARGS="--seed 3 --count 10"
chaos soak fuzz: $(VENV)/ready
	$(RUN) -m benchmarks.reliability.$@ $(ARGS)

distributed: $(VENV)/ready
	$(RUN) -m benchmarks.distributed $(ARGS)

# folora as a stranger gets it: README's commands with the wheel in an environment of its own, first
# without extras. The versions are the lock file's.
wheel: $(VENV)/ready
	rm -rf build
	$(RUN) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/outside/wheel .
	$(RUN) tests/project/wheel.py build/outside $(LOCK) build/outside/wheel/*.whl $(CPU_LOCK)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pip check

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Every file that is installed must have a hash in the lock file. It goes in by parts: the build
# backend, which source packages need; the rest; and what CUDA needs, unless torch is a CPU build.
$(VENV)/ready: pyproject.toml $(LOCK) $(CPU_LOCK)
	$(PYTHON) -m venv $(VENV)
	awk '/^[a-z]/ { part = /^setuptools=/ ? "backend" : /^(cuda-|nvidia-|triton=)/ ? "cuda" : "rest" } \
	    part { print > ("$(VENV)/" part ".txt") }' $(LOCK)
	$(VENV)/bin/$(INSTALL) --requirement $(VENV)/backend.txt
	$(VENV)/bin/$(INSTALL) --requirement $(CPU_LOCK) || echo "torch is taken from PyPI then"
	$(VENV)/bin/$(INSTALL) --requirement $(VENV)/rest.txt
	$(VENV)/bin/pip check >/dev/null || $(VENV)/bin/$(INSTALL) --requirement $(VENV)/cuda.txt
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(VENV)/bin/pip check
	touch $@

# What looks at the project from outside: none of it is imported, or could be beside what is.
$(TOOLS)/ready: $(TOOLS_LOCK)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/$(INSTALL) --requirement $(TOOLS_LOCK)
	touch $@

# Versions stay unless they no longer fit; for new ones: make lock UPGRADE=--upgrade
lock: $(TOOLS)/ready
	$(COMPILE) --extra dev --output-file $(LOCK) pyproject.toml
	$(COMPILE) --group tools --output-file $(TOOLS_LOCK)

# What is installed, as CycloneDX.
sbom: $(VENV)/ready $(TOOLS)/ready
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
	    --mc-type library --output-file sbom.json $(VENV)

# Asks PyPI for known vulnerabilities; --strict, or a package it has no answer for would pass.
audit: $(TOOLS)/ready
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --requirement $(LOCK)

clean:
	rm -rf $(VENV) $(TOOLS) build sbom.json demo/output
