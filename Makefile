# make demo   set-up and a three-minute comparison on real data
# make test   set-up and the whole test suite
# make faults every attack of tests/faults, an hour at most on two cores; writes benchmarks/results/faults.json and docs/errors.md
#
# TORCH chooses the torch build that the virtual environment gets. The default is a CPU build where the package index
# offers one for exactly this version; on a CUDA machine use e.g.  make demo TORCH="torch"  (any pip requirement, or
# several words: TORCH="torch --index-url https://download.pytorch.org/whl/cu130"). TORCH=none keeps what is installed.
# PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEEDED_MIB := 3000

# Small disks are mounted, which root may; others get a namespace of their own.
MAY_MOUNT := $(shell [ "$$(id -u)" = 0 ] || ! unshare -rm true 2>/dev/null || echo unshare -rm)

.PHONY: demo test faults lint types setup clean
.DEFAULT_GOAL := demo

demo: setup
	$(BIN)/dblocks compare digits --preset demo --methods end-to-end,shallow,diffusionblocks --jobs 2 --output-dir runs/demo

test: $(VENV)/.ready-to-test
	$(BIN)/python -m pytest -n 2 --dist loadfile
	# New memory holds huge numbers there, so that what is read before it was written shows.
	MALLOC_PERTURB_=1 DIFFUSIONBLOCKS_TEST_DEVICE=sim $(BIN)/python -m pytest -n 2 tests/second_device

faults: $(VENV)/.ready-to-test
	rm -rf .faults && mkdir -p .faults
	DIFFUSIONBLOCKS_FAULTS=all DIFFUSIONBLOCKS_FAULTS_RECORDS=$(CURDIR)/.faults $(MAY_MOUNT) \
	  $(BIN)/python -m pytest tests/faults -n 2 --dist loadfile -q --tb=no || true
	$(BIN)/python -m tests.faults.result .faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1 | tail -n 1); use make PYTHON=python3.12" >&2; exit 2; }
	@free=$$(df -Pm . | awk 'NR==2 {print $$4}'); [ -f $(READY) ] || [ "$$free" -ge $(NEEDED_MIB) ] || \
	  { echo "make: the set-up needs $(NEEDED_MIB) MiB of disk here, only $$free MiB are free" >&2; exit 2; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: cannot create $(VENV); on Debian install the package python3-venv" >&2; exit 2; }
	@[ "$(TORCH)" = none ] || $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[images,text,tracking,adapt,test]'
	@touch $(READY)

$(VENV)/.ready-to-test: $(READY)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[harness]'
	@touch $@

clean:
	rm -rf $(VENV) runs
