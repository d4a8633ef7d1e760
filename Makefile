# make test | quick | nightly | oldest | demo | benchmark | docs | lint | stubs | clean. All in .venv, made by $(PYTHON), 3.11+.
# On Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes: torch's CPU build.

PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
# More options for the demo's `gpmetric discover`, for instance DEMO_OPTIONS="--minutes 5".
DEMO_OPTIONS ?= --evaluations 150

BASELINES := magnitude magnitude_row wanda ria gblm_l1 gblm_l2 pruner_zero sparsegpt
# Not 0.7: a model this small is destroyed there (perplexity 13 becomes 144 to 434), and ranks by chance.
TARGETS := 0.5 0.6 2:4

# What tells whether a version of a dependency is too old: parsing, masks, the command line, files, pictures.
OLDEST := expression canonical mask cli bench ledger analysis models checkpoint

.PHONY: test quick nightly oldest demo benchmark docs lint stubs clean

# Two processes of one thread each; one that has nothing left takes over half of what the other still has to do.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not nightly"

# What is worth waiting for between two edits: all but lanes of kernels, searches killed everywhere, wheels and types.
quick: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not nightly"

# All there is: also more cases of what `make test` shows for a few.
nightly: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The same on the oldest dependencies that pyproject.toml allows, in an environment of its own: 6 GB, or 2 with the CPU
# build of torch. Libraries warn of other things than the newest ones do.
oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -W default -m "not slow and not nightly" $(OLDEST:%=tests/test_%.py)

# A second `make demo` resumes the ledger of the first one. The formula holds * and ( ), hence the quoted variable.
demo: .venv/installed
	mkdir -p $(DEMO)
	$(BIN)/gpmetric discover $(TARGETS:%=--target %) --samples 64 --seed 0 $(DEMO_OPTIONS) \
		--ledger $(DEMO)/ledger.sqlite --resume --json $(DEMO)/discover.json
	$(BIN)/gpmetric export $(DEMO)/ledger.sqlite --format python -o $(DEMO)/metric.py
	metric=$$($(BIN)/python -c 'import json; print(json.load(open("$(DEMO)/discover.json"))["winner"]["formula"])') && \
	$(BIN)/gpmetric bench --metric "$$metric" $(BASELINES:%=--metric %) $(TARGETS:%=--target %) \
		--samples 64 --windows 128 --json $(DEMO)/bench.json

# The figures of README and documentation measured again: BENCHMARK=--quick takes under twenty minutes; trained models and
# their texts are named by BENCHMARK="--models DIR --texts DIR".
benchmark: .venv/installed
	$(BIN)/python benchmarks/benchmark.py $(BENCHMARK)

# The pages of docs/ as a site in build/site, which opens from disk.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: .venv/installed
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy gpmetric

# What type checkers and editors know of the functions; after a change of a command's options.
stubs: .venv/installed
	$(BIN)/python benchmarks/make_stub.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The stamp of a finished installation, renewed when what is to be installed has changed.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/pip || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e . pytest hypothesis
	touch $@
