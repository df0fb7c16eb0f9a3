# Each target works on its own: it makes the virtual environment that it needs.
PYTHON ?= python3
XEN ?= 4.17 4.20
VENV := .venv
BIN := $(VENV)/bin
# Python starts hundreds of times in a run of the tests. Where no bytecode is kept, each start
# compiles the package, and each worker all tests.
export PYTHONDONTWRITEBYTECODE =
# For coverage: what no test comes to is not to be a matter of luck.
MORE := XENMAPCACHE_MODEL=$${XENMAPCACHE_MODEL:-100} XENMAPCACHE_FUZZ=$${XENMAPCACHE_FUZZ:-300} \
	XENMAPCACHE_RACES=$${XENMAPCACHE_RACES:-3} \
	XENMAPCACHE_EXAMPLES=$${XENMAPCACHE_EXAMPLES:-1} \
	XENMAPCACHE_BINDINGS=$${XENMAPCACHE_BINDINGS:-both} \
	XENMAPCACHE_INTERRUPTS=$${XENMAPCACHE_INTERRUPTS:-1}
# A few tests of each kind: the machine, a live guest, INVALIDATE, a device model, what Xen tells.
XEN_QUICK := tests/xen/test_lab_smoke.py tests/xen/test_live_guest.py tests/xen/test_survey.py \
	tests/xen/test_invalidate.py
PEERS_VENV := .venv-peers
PEERS := volatility3 drgn libvmi microvmi pykdumpfile

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z][a-z-]*:.*  ## / {printf "make %-20s %s\n", $$1, $$2}' Makefile

.PHONY: help demo test test-quick test-bare coverage mutants test-free-threaded test-images test-xen test-xen-quick seen lint types bench bench-sources bench-drgn bench-dma bench-disk bench-scaling bench-window bench-xen docs man completion release-check clean

demo: $(VENV)/cli,timeline.stamp  ## set up, and show the main job on a mock guest
	@mkdir -p build
	@$(BIN)/xenmapcache demo -o build/demo.html

test: $(VENV)/test.stamp  ## run the tests that need no Xen, on two processors, and print the ten slowest
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10

test-quick: $(VENV)/test.stamp  ## run the tests that are not marked slow, within a minute
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not xen and not images and not slow"

test-bare:  ## run demo and test on a bare Debian without a compiler and Xen's files
	$(PYTHON) -m tests.bare_machine

coverage: $(VENV)/test.stamp  ## run the tests, and check that they reach every line and branch
	$(BIN)/python -m coverage erase
	$(MORE) $(BIN)/python -m coverage run -m pytest -q -n 2 --dist worksteal
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

test-free-threaded:  ## run the tests of threads on CPython without a GIL, which is built if it is missing
	$(PYTHON) -m tests.free_threaded

test-images: $(VENV)/test.stamp  ## boot a Linux guest under emulation, and read its memory in every form
	$(BIN)/python -m pytest -v -m images $(ARGS)

test-xen: $(VENV)/test.stamp  ## boot a real Xen under emulation and run the tests in its Dom0; XEN= names machines
	@mkdir -p build/xen
	set -e; for xen in $(XEN); do \
		$(BIN)/python -m pytest -v -m "xen and not benchmark" --xen=$$xen \
		--junitxml=build/xen/$$xen.xml $(ARGS); done

test-xen-quick: $(VENV)/test.stamp  ## the same on one machine within three minutes
	$(BIN)/python -m pytest -v -m "xen and not slow" --xen=$(firstword $(XEN)) $(XEN_QUICK)

seen: $(VENV)/test.stamp  ## print which machine has shown what, from the results of make test-xen
	@$(BIN)/python -m tests.xen.lab.seen build/xen/*.xml $(ARGS)

lint: $(VENV)/test.stamp  ## check style, format, types, and that the generated binding is up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python build_ffi.py --check

types: $(VENV)/types.stamp  ## check that mypy and pyright find the types of the installed package
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
		cp .ci/uses_types.py "$$folder"; bin=$$PWD/$(BIN); cd "$$folder"; \
		"$$bin/mypy" --strict --cache-dir=/dev/null uses_types.py; \
		PATH="$$PATH:$$bin" "$$bin/pyright" --pythonpath "$$bin/python" uses_types.py

mutants: $(VENV)/test.stamp  ## break the package in many places, and check that a test notices each break
	$(BIN)/python -m tests.mutation $(ARGS)

bench: $(PEERS_VENV)/stamp  ## measure the promised speed, and compare with other packages; ARGS=--write for the docs
	$(PEERS_VENV)/bin/python -m tests.benchmarks $(ARGS)

bench-sources: $(PEERS_VENV)/stamp  ## measure the commands on a real guest's memory, and compare with grep, strings, dd and others
	$(PEERS_VENV)/bin/python -m tests.benchmarks.sources $(ARGS)

bench-drgn: $(PEERS_VENV)/stamp  ## measure drgn's reads through a cache, and compare with drgn's own reader of the same core
	$(PEERS_VENV)/bin/python -m tests.benchmarks.drgn $(ARGS)

bench-dma: $(PEERS_VENV)/stamp  ## count the map calls of DMA, and compare with other policies; ARGS=--write for the docs
	$(PEERS_VENV)/bin/python -m tests.benchmarks.dma $(ARGS)

bench-disk: $(VENV)/test.stamp  ## measure a 4 KiB request of a virtio disk, and compare with a loop written by hand
	$(BIN)/python -m tests.benchmarks.disk $(ARGS)

bench-scaling: $(PEERS_VENV)/stamp  ## measure cost against size; ARGS=--write for the docs
	$(PEERS_VENV)/bin/python -m tests.benchmarks.scaling $(ARGS)

bench-window: $(PEERS_VENV)/stamp  ## hash and walk memory through windows; ARGS=--write for the docs
	$(PEERS_VENV)/bin/python -m tests.benchmarks.window $(ARGS)

bench-xen: $(VENV)/test.stamp  ## measure device models on a real Xen, under emulation
	@mkdir -p build/xen
	set -e; for xen in $(XEN); do \
		$(BIN)/python -m pytest -v -m "xen and benchmark" --xen=$$xen \
		--junitxml=build/xen/$$xen-speed.xml tests/xen; done

docs: $(VENV)/docs.stamp  ## build the documentation as HTML in docs/_build
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build
	@echo "docs/_build/index.html"

man: $(VENV)/docs.stamp  ## build the man page from the command's own --help
	mkdir -p build/man
	$(BIN)/argparse-manpage --module xenmapcache.cli.parser --function make_parser \
		--project-name xenmapcache --manual-title "User Commands" \
		--output build/man/xenmapcache.1
	@echo "build/man/xenmapcache.1"

completion: $(VENV)/docs.stamp  ## build the completion for shells
	mkdir -p build/completion
	for shell in bash zsh tcsh; do \
		$(BIN)/python -m shtab xenmapcache.cli.parser.make_parser --shell $$shell \
			> build/completion/xenmapcache.$$shell || exit 1; done
	@echo "build/completion/xenmapcache.{bash,zsh,tcsh}"

release-check:  ## build sdist and wheel, install each into an empty environment, and run the demo
	.ci/release-check $(PYTHON)

clean:  ## remove all that the targets have made
	rm -rf $(VENV) $(PEERS_VENV) build dist docs/_build *.egg-info

# One stamp for each set of extras. When pyproject.toml changes, the extras are installed again.
$(VENV)/%.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@# Each worker would compile all tests in the first run. An error is one there, and is shown there.
	@if [ $* = test ]; then $(BIN)/python -m pytest -q --collect-only > /dev/null || true; fi
	@touch $@

# If a peer cannot be installed, the benchmark reports the reason from the log. The newest pykdumpfile
# needs a newer libkdumpfile than that of Debian 12 (headers: libkdumpfile-dev). An older pykdumpfile
# lacks one name there, a format of page tables that we do not use, so a macro defines the name.
$(PEERS_VENV)/stamp: pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --editable '.[bench]'
	for peer in $(PEERS); do \
		$(PEERS_VENV)/bin/python -m pip install --quiet $$peer > $(PEERS_VENV)/$$peer.log 2>&1 || \
			echo "$$peer cannot be installed: see $(PEERS_VENV)/$$peer.log"; done
	$(PEERS_VENV)/bin/python -c 'import kdumpfile' 2> /dev/null || CFLAGS=-DADDRXLAT_PTE_ARM=-1 \
		$(PEERS_VENV)/bin/python -m pip install --quiet pykdumpfile==0.5.3.1 > /dev/null 2>&1 || true
	touch $@
