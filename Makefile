# make book   the environment, then the book; prints the file to open
# make test   the environment, then everything that CI runs
# make lab    the chapters in JupyterLab, to work in
# make slides a deck of slides for each chapter, for a lecture
# make lite   with PYODIDE=folder: a page of by-hand cells that runs in the browser
# make bench  the measurements that book/benchmarks.ipynb draws

SHELL := /bin/bash
PYTHON ?= python3
# cpu: the small CPU build of torch; auto: the build for your GPU's driver; empty: the registry's own
TORCH_BACKEND ?=

BIN := .venv/bin
READY := .venv/.ready
BOOK := _build/html/index.html
CHAPTERS := $(wildcard book/[0-9]*.ipynb)
# What is executed and compared: the chapters, and the pages that draw the measurements.
PAGES := $(CHAPTERS) $(if $(filter file,$(origin CHAPTERS)),book/benchmarks.ipynb book/zoo.ipynb book/trust.ipynb)
FOLDERS := gradinv_edu tests book $(wildcard exercises benchmarks)
# Tests compare figures: one thread each, so that sums are taken in one order everywhere.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: book test lab slides lite execute format bench clean lint html unit chapters

book: html
	@echo
	@echo "The book is built. Open $(CURDIR)/$(BOOK)"

# Cheap checks first.
test: lint html chapters unit

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=book

# Runs every chapter again and stores its outputs: make execute, or CHAPTERS=book/01_perceptron.ipynb
execute: $(READY)
	$(ONE_THREAD) $(BIN)/python book/execute.py $(PAGES)

# A deck a chapter, in _build/slides; CHAPTERS=… for one.
slides: $(READY)
	$(BIN)/python book/slides.py $(CHAPTERS)

# Needs what no package index has: a release of Pyodide, unpacked; book/lite.py says what is missing.
lite: $(READY)
	$(BIN)/python book/lite.py "$(PYODIDE)"

format: $(READY)
	$(BIN)/ruff format $(FOLDERS)
	$(BIN)/ruff check --fix $(FOLDERS)

# Measures what is not stored yet; BENCH="scaling --again" measures a section anew.
BENCH ?=
bench: $(READY)
	$(ONE_THREAD) $(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

lint: $(READY)
	$(BIN)/ruff format --check $(FOLDERS)
	$(BIN)/ruff check $(FOLDERS)
	$(BIN)/mypy

# From clean: an incremental build does not repeat the warnings of pages it leaves alone.
html: $(READY)
	rm -rf _build
	$(BIN)/jupyter-book build . -W -n --keep-going

# Every cell runs again, and what it prints must be what the page shows.
chapters: $(READY)
	$(PYTEST) --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg --timeout 600 $(PAGES)

unit: $(READY)
	$(PYTEST) tests

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) \
		-e '.[book,test]' -c constraints.txt
	touch $@
