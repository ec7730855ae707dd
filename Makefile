# Two commands on a fresh machine: `make demo` and `make test`. The full job: `make harvest`, `make train L1=3e-4`, `make eval`.
# On a disk that is too small for it: `make job DISK=4TB L1=3e-4,8e-5,adaptive`.
# Everything else a command can do is an option of it: `rsae train --help`; pass them as ARGS="--layers 0-5".

PYTHON ?= python3
PRESET ?= pythia-410m
CACHE  ?= data/$(PRESET)
RUNS   ?= runs
DISK   ?= 4TB
ARGS   ?=
PY     := .venv/bin/python
# uv takes seconds where pip takes minutes
PIP    := $(if $(shell command -v uv),uv pip install --quiet --python $(PY),$(PY) -m pip install --quiet)

quoted  = '$(subst ','\'',$(1))'
PLACES := --preset $(call quoted,$(PRESET)) --cache $(call quoted,$(CACHE))
TRAINED := --runs $(call quoted,$(RUNS)) $(if $(L1),--l1 $(call quoted,$(L1)))

# one more than there are cores: some tests wait for servers and processes
WORKERS := -n $(shell expr $$(nproc 2>/dev/null || echo 2) + 1) --maxprocesses 5 --dist loadfile

.NOTPARALLEL:
.PHONY: setup check demo harvest train eval job test slow crash soak bench clean

setup: .venv/ready
check: .venv/ready-to-check

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	touch $@

.venv/ready-to-check: requirements-dev.txt .venv/ready
	$(PIP) -r requirements-dev.txt
	touch $@

# every stage on the model and text that come with the repository: every second layer, and the pages of one
demo: setup
	$(PY) -m harvest --preset demo
	$(PY) -m train --preset demo --layers 1,3,5
	$(PY) -m eval --preset demo --snapshots final
	$(PY) -m eval pages --preset demo --layers 3
	@echo "report: runs/report.html    feature pages: runs/pages/index.html"

harvest: setup
	$(PY) -m harvest $(PLACES) $(ARGS)

train: setup
	$(PY) -m train $(PLACES) $(TRAINED) $(ARGS)

eval: setup
	$(PY) -m eval $(PLACES) --runs $(call quoted,$(RUNS)) $(ARGS)

# windows of as many layers as DISK takes: harvest, train, evaluate, make room; run it again to continue
job: setup
	$(PY) -m fleet job --disk $(call quoted,$(DISK)) $(PLACES) $(TRAINED) $(ARGS)

test: check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest $(WORKERS)

# the tests that `make test` leaves out, since they take as long as all the others
slow: check
	$(PY) -m pytest $(WORKERS) -m slow $(ARGS)

# every fault at every file operation of every command; `make test` has a spread of them
crash: check
	$(PY) -m tests.crash $(ARGS)

# minutes of servers that die, and shards under torchrun, on top of what `make test` has of it
soak: check
	$(PY) -m pytest -m soak $(ARGS)

bench: setup
	$(PY) -m bench $(ARGS)

# what a command makes again in seconds; caches and runs are the user's own
clean:
	rm -rf *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
