# make demo   train a small model with experiments and report: the first thing to try
# make test   the whole suite · make test-long   what takes minutes each · make lint   style and types · make bench · make docs
#
# PYTHON=python3.12   the interpreter that .venv is made with (default: the first one >= 3.11)
# TORCH=torch==2.13.0 installed first, so that a CPU or CUDA build that pip is pointed to is kept

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-long slurm lint bench docs clean

TORCH ?= torch==2.13.0
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST_ARGS ?= -n 2 --dist loadgroup
SLURM := slurm-wlm munge iproute2
CANDIDATES := $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14 python)

demo: $(VENV)/.installed
	$(VENV)/bin/motet demo

test: slurm $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# What takes minutes each and is left out above (brute force against the planner's search).
test-long: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m long

# Slurm for the tests that live on the testbed (docs/testbed.md): installed where that can be done without asking.
slurm:
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	if type -P slurmctld sbatch munged ip tc >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get install -y -q $(SLURM) || { apt-get update -q && apt-get install -y -q $(SLURM); } || \
	        echo "make: $(SLURM) could not be installed: tests on a real Slurm will be skipped"; \
	else \
	    echo "make: no Slurm here: tests on a real Slurm will be skipped (apt-get install $(SLURM), run as root)"; \
	fi

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed-dev
	for script in bench/*.py; do echo "== $$script"; $(VENV)/bin/python "$$script"; done

docs: $(VENV)/.installed-dev
	$(VENV)/bin/python -m motet.launcher.config.reference docs/reference.md
	$(VENV)/bin/python docs/make_api.py docs/api.md
	PYTHONPATH=. $(VENV)/bin/python -m tests.architecture
	$(VENV)/bin/python -m mkdocs build --quiet

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        found="$$candidate"; break; \
	    fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "make: no Python >= 3.11 among: $(CANDIDATES)"; \
	    echo "make: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "make: $$found lacks the venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; \
	fi; \
	"$$found" -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(PIP) install "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -e '.[dev]'
	touch $@ $(VENV)/.installed
