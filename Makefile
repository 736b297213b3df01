# Each target makes what it needs: on a bare machine with Python >= 3.11, `make demo` is the only command.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Tests of one group share what they prepare; see tests/conftest.py.
PARALLEL := --numprocesses auto --dist loadgroup

.PHONY: demo test slow faults lint format bench docs venv clean

demo: venv  ## open-set recognition on handwritten digits: about two minutes, prints a table, draws pictures
	$(RUN) train.py fit -c configs/osrci/digits.yaml

test: venv  ## the whole test suite except what takes minutes
	$(RUN) -m pytest -m "not slow" $(PARALLEL)

slow: venv  ## the tests that take minutes
	$(RUN) -m pytest -m slow

faults: venv  ## breaks every training in the ways a cluster does and prints what was lost; an hour on two cores
	$(RUN) -m tests.suites.campaign

lint: venv  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: venv
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: venv  ## ratios against plain PyTorch loops, measured in the same run
	for script in benchmarks/*.py; do $(RUN) $$script || exit 1; done

docs: venv  ## the pages as a site in site/, which opens from the disk; a broken link is an error
	$(RUN) docs/generate.py --check
	$(RUN) -m zensical build --clean --strict

venv: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, $(PYTHON) is older; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint,bench]'
	@touch $@

clean:
	rm -rf $(VENV) build site .cache *.egg-info
