# Every target makes .venv by itself, from python3 (3.10 or newer) alone: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process a core with one thread each: the problems are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q
# Files of examples/ that read options; the others are shared by them.
EXAMPLES := $(basename $(notdir $(shell grep -l "parse.Config" examples/*.py)))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-all test-gpu test-processors lint examples notebook bench bench-peers bench-quick docs links prose screenshots wheel check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## tune 640 hyperparameters on the digits data, in under a minute
	$(BIN)/python -m examples.tune_digits

test: $(VENV)/.dev ## the fast tests, with the doctests
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow || [ $$? -eq 5 ]  # 5: no test is marked slow

test-all: test test-slow ## every test, the slow ones too

test-gpu: $(VENV)/.dev ## every public function on an accelerator: make test-gpu DEVICE=cuda:1
	$(BIN)/python -m pytest -q tests/test_devices.py --device $(or $(DEVICE),cuda)

# What rounding decides shows where products are: solvers and hypergradients.
NUMERICAL := tests/solvers tests/implicit/test_hypergradient.py tests/test_solution.py tests/test_hypergradients.py tests/test_fuzz.py
test-processors: $(VENV)/.dev ## the numerical tests as on other processors, which some settings emulate
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q -m "not slow" $(NUMERICAL)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -n auto -q -m "not slow" $(NUMERICAL)

lint: $(VENV)/.dev ## formatting, ruff's rules, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

examples: $(VENV)/.examples ## the examples, reduced, into results/fast
	for name in $(EXAMPLES); do \
	  case $$name in with_*) $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue ;; esac; \
	  $(BIN)/python -m examples.$$name --fast --output results/fast || exit 1; \
	done  # extras of other frameworks are for Python 3.11 and newer

notebook: $(VENV)/.examples ## the notebook of examples/logistic_regression.py, anew from the script
	$(BIN)/jupytext --update --to ipynb examples/logistic_regression.py

bench: $(VENV)/.dev ## the benchmarks, about 20 minutes of one core: tables, JSON, pictures in docs/results
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH)

bench-peers: $(VENV)/.peers ## the benchmarks with the other libraries installed, in the same environment
	-$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps betty-ml boat-torch
	$(MAKE) bench

bench-quick: $(VENV)/.dev
	$(BIN)/python -m benchmarks --quick

docs: $(VENV)/.docs ## the documentation, into build/site
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/site

links: docs ## links, sections, alt texts and distances of the built documentation
	$(BIN)/python tools/links.py build/site

prose: $(VENV)/.docs ## spelling, and the house's rules of prose
	$(BIN)/python tools/prose.py

screenshots: docs ## the documentation in a headless browser: widths, contrast, pictures; into build/screenshots
	$(BIN)/python tools/screenshots.py build/site build/screenshots

wheel: ## sdist and wheel, installed in clean environments, with a user's program and its types
	PYTHON=$(PYTHON) tools/wheel.sh

check: lint prose test-all examples bench-quick docs links ## everything that must pass before a change is merged

format: $(VENV)/.dev ## format, and mend what ruff can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra of pyproject.toml: demo, examples, dev, docs, peers.
$(VENV)/.demo $(VENV)/.examples $(VENV)/.dev $(VENV)/.docs $(VENV)/.peers: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing hypergrad[$*] into $(VENV): the first time downloads torch, which takes minutes."
	@echo "Without a GPU a smaller torch does: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make $(firstword $(MAKECMDGOALS))"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 10) or sys.exit("hypergrad needs Python 3.10 or newer, and $(PYTHON) is " + v + ": name a newer one, as in make test PYTHON=python3.12.")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
