# Every target works on a machine that has only python3 (3.10 or newer) and make.
# The first call creates .venv and installs into it; later calls start at once.

PYTHON ?= python3
BACKEND ?= torch

VENV := .venv
EXTRAS := all,dev
CONSTRAINTS := constraints.txt
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished

# Two processes of one thread each. The tests of a module mostly stay together, for they share
# compilations; a process that is done takes half of what the other has left.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal

# The core's tests, without those of adapters, documents and benchmarks.
KERNELS ?= Prescott Sandybridge
JAX_TESTS := $(addprefix tests/,adapters/jax adapters/shared properties solvers)
CORE_TESTS := $(addprefix tests/,arrays operators results iterative low_rank solvers bilevel \
	influence properties)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-kernels test-jax check format docs install clean

help:
	@echo "make demo       data hyper-cleaning with every solver side by side, and the"
	@echo "                images that helped and harmed a prediction; writes ./results"
	@echo "                (make demo BACKEND=jax for JAX)"
	@echo "make test       the quick tests and the examples in the docstrings"
	@echo "make test-slow  the tests left out of make test"
	@echo "make test-kernels  the core's quick tests under other kernels of OpenBLAS and PyTorch"
	@echo "                (KERNELS='Prescott Sandybridge'; x86 only)"
	@echo "make test-jax   the quick tests of JAX: with VENV=.venv-jax EXTRAS=jax,dev PYTHON=python3.12"
	@echo "                those of its newest version, without PyTorch"
	@echo "make check      ruff, mypy and the documentation build"
	@echo "make format     let ruff mend and format the sources"
	@echo "make docs       build the documentation into ./site"
	@echo "make install    only create .venv (make install PYTHON=python3.12 to choose one)"
	@echo "make clean      remove .venv and everything that was built"

demo: $(STAMP)
	$(PY) -m benchmarks hypercleaning --backend $(BACKEND)
	$(PY) -m benchmarks leaveoneout

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu"

# Sums come out in another order on other processors: no test may depend on one. JAX has kernels
# of its own.
test-kernels: $(STAMP)
	for kernel in $(KERNELS); do \
		OPENBLAS_CORETYPE=$$kernel ATEN_CPU_CAPABILITY=default $(PYTEST) -k "not jax" $(CORE_TESTS) || exit 1; \
	done

test-jax: $(STAMP)
	$(PYTEST) -k jax $(JAX_TESTS)

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mkdocs build --strict

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(STAMP)
	$(PY) -m mkdocs build --strict

install: $(STAMP)

# An install that was cut short leaves $(UNFINISHED) behind and is begun anew;
# an environment that is whole is only brought up to date.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if [ -e $(UNFINISHED) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
		echo "Creating $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@touch $(UNFINISHED)
	@echo "Installing the package and its tools into $(VENV); the first time takes minutes"
	@$(PY) -m pip install -qq -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@mv $(UNFINISHED) $(STAMP)

clean:
	rm -rf $(VENV) site dist build results .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
