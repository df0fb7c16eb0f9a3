# Each target stands alone: it makes the virtual environment that it needs.
PYTHON ?= python3
XEN ?= 4.17 4.20
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-xen lint bench bench-xen docs clean

demo: $(VENV)/cli.stamp  ## set up, and show the main job on the mock
	@$(BIN)/xenmapcache demo

test: $(VENV)/test.stamp  ## the tests that need no Xen
	$(BIN)/python -m pytest

test-xen: $(VENV)/test.stamp  ## boot a real Xen under emulation and run the tests in its Dom0
	set -e; for xen in $(XEN); do $(BIN)/python -m pytest -v -m xen --xen=$$xen; done

lint: $(VENV)/test.stamp  ## lint, format, types, and whether the generated binding is up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python build_ffi.py --check

bench: $(VENV)/test.stamp  ## the promised speed, as ratios within one run
	$(BIN)/python -m tests.benchmarks

bench-xen: $(VENV)/test.stamp  ## the speed of device models on a real Xen, under emulation
	set -e; for xen in $(XEN); do \
		$(BIN)/python -m pytest -v -m xen --xen=$$xen tests/xen/test_devicemodel_speed.py; done

docs: $(VENV)/docs.stamp  ## the documentation as HTML in docs/_build
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build
	@echo "docs/_build/index.html"

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info

# A stamp per set of extras: installed again when pyproject.toml changes.
$(VENV)/%.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
