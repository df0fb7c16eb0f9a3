# Each target stands alone: it makes the virtual environment that it needs.
PYTHON ?= python3
XEN ?= 4.17 4.20
VENV := .venv
BIN := $(VENV)/bin
PEERS_VENV := .venv-peers
PEERS := volatility3 drgn libvmi microvmi pykdumpfile

.PHONY: demo test coverage mutants test-free-threaded test-xen lint bench bench-dma bench-scaling bench-xen docs man completion clean

demo: $(VENV)/cli.stamp  ## set up, and show the main job on the mock
	@$(BIN)/xenmapcache demo

test: $(VENV)/test.stamp  ## the tests that need no Xen
	$(BIN)/python -m pytest

coverage: $(VENV)/test.stamp  ## the same, and that they come to every line and branch
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

test-free-threaded:  ## what threads matter to, on CPython without a GIL, which is built if need be
	$(PYTHON) -m tests.free_threaded

test-xen: $(VENV)/test.stamp  ## boot a real Xen under emulation and run the tests in its Dom0
	set -e; for xen in $(XEN); do $(BIN)/python -m pytest -v -m xen --xen=$$xen; done

lint: $(VENV)/test.stamp  ## lint, format, types, and whether the generated binding is up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python build_ffi.py --check

mutants: $(VENV)/test.stamp  ## break the package in many places, and see each break noticed by a test
	$(BIN)/python -m tests.mutation $(ARGS)

bench: $(PEERS_VENV)/stamp  ## the promised speed, and ours beside peers; ARGS=--write for the docs
	$(PEERS_VENV)/bin/python -m tests.benchmarks $(ARGS)

bench-dma: $(PEERS_VENV)/stamp  ## map calls of DMA, ours beside other policies; ARGS=--write for the docs
	$(PEERS_VENV)/bin/python -m tests.benchmarks.dma $(ARGS)

bench-scaling: $(PEERS_VENV)/stamp  ## cost against size; ARGS=--write for the docs
	$(PEERS_VENV)/bin/python -m tests.benchmarks.scaling $(ARGS)

bench-xen: $(VENV)/test.stamp  ## the speed of device models on a real Xen, under emulation
	set -e; for xen in $(XEN); do \
		$(BIN)/python -m pytest -v -m xen --xen=$$xen tests/xen/test_devicemodel_speed.py; done

docs: $(VENV)/docs.stamp  ## the documentation as HTML in docs/_build
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build
	@echo "docs/_build/index.html"

man: $(VENV)/docs.stamp  ## the man page, from the command's own --help
	mkdir -p build/man
	$(BIN)/argparse-manpage --module xenmapcache.cli.parser --function make_parser \
		--project-name xenmapcache --manual-title "User Commands" \
		--output build/man/xenmapcache.1
	@echo "build/man/xenmapcache.1"

completion: $(VENV)/docs.stamp  ## completion for shells
	mkdir -p build/completion
	for shell in bash zsh tcsh; do \
		$(BIN)/python -m shtab xenmapcache.cli.parser.make_parser --shell $$shell \
			> build/completion/xenmapcache.$$shell || exit 1; done
	@echo "build/completion/xenmapcache.{bash,zsh,tcsh}"

clean:
	rm -rf $(VENV) $(PEERS_VENV) build dist docs/_build *.egg-info

# A stamp per set of extras: installed again when pyproject.toml changes.
$(VENV)/%.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

# A peer that cannot be installed leaves a log behind, from which the benchmark tells why. The newest
# pykdumpfile needs a newer libkdumpfile than Debian 12's, which has the headers in libkdumpfile-dev.
# An older one lacks a single name there, of a format of page tables, which is not used.
$(PEERS_VENV)/stamp: pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --editable '.[bench]'
	for peer in $(PEERS); do \
		$(PEERS_VENV)/bin/python -m pip install --quiet $$peer > $(PEERS_VENV)/$$peer.log 2>&1 || \
			echo "$$peer cannot be installed: see $(PEERS_VENV)/$$peer.log"; done
	$(PEERS_VENV)/bin/python -c 'import kdumpfile' 2> /dev/null || CFLAGS=-DADDRXLAT_PTE_ARM=-1 \
		$(PEERS_VENV)/bin/python -m pip install --quiet pykdumpfile==0.5.3.1 > /dev/null 2>&1 || true
	touch $@
