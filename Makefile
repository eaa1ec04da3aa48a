# Two commands need nothing but Python 3.10 to 3.13:  make demo  and  make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/ioi

.PHONY: demo test papers browser ndif ndif-ready lint check lab bench constraints clean

# A stamp a dependency set, so that a second run installs nothing.
$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.runtime: $(VENV)/.pip pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install -q -c constraints.txt --group dev
	@touch $@

$(VENV)/.lab: $(VENV)/.runtime
	$(PIP) install -q -c constraints.txt -e ".[lab]"
	@touch $@

demo: $(VENV)/.runtime  ## which heads of SmolLM2-135M do indirect object identification?
	$(BIN)/mechkit discover ioi --model smollm2-135m --n 24 --out $(OUT)

test: $(VENV)/.dev  ## every test: tiny models side by side, then the real one with the whole machine
	$(BIN)/python -m pytest -m "not real_model" --numprocesses=2
	$(BIN)/python -m pytest -m real_model

papers: $(VENV)/.dev  ## run every reproduction of a paper anew and write its notebook
	for one in notebooks/papers/*.py; do $(BIN)/jupytext --quiet --to ipynb --execute "$$one" || exit 1; done

$(VENV)/.browser: $(VENV)/.dev
	$(PIP) install -q -c constraints.txt --group browser
	@touch $@

browser: $(VENV)/.browser  ## the live views in JupyterLab, used in Chromium (which the system must have)
	$(BIN)/python -m pytest tests/test_pages.py tests/test_access.py tests/test_lab.py tests/test_lab_views.py $(BROWSER_ARGS)

# NDIF's server needs Python 3.12, in an environment of its own.
PYTHON312 ?= $(firstword $(shell for one in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python3.12; do \
  "$$one" -c "" 2>/dev/null && echo "$$one"; done) python3.12)

$(VENV)/.ndif: tests/ndif/requirements.txt $(VENV)/.dev
	$(PYTHON312) -m venv $(VENV)/ndif
	$(VENV)/ndif/bin/python -m pip --disable-pip-version-check install -q -r tests/ndif/requirements.txt
	@touch $@

ndif-ready:  ## says what the tests against a running NDIF lack here
	@"$(PYTHON312)" -c "import venv, ensurepip" 2>/dev/null || { echo "There is no Python 3.12 for NDIF's server."; exit 1; }
	@for one in redis-server unshare ip; do command -v $$one >/dev/null || { echo "There is no $$one."; exit 1; }; done
	@python3 tests/ndif/apart.py true || { echo "A network namespace cannot be made here."; exit 1; }

ndif: $(VENV)/.ndif  ## tests against a whole NDIF on loopback (Linux; needs redis-server, unshare, ip, Python 3.12)
	$(BIN)/python tests/ndif/apart.py $(VENV)/ndif/bin/python tests/ndif/bed.py --folder runs/ndif -- \
	  $(BIN)/python -m pytest tests/ndif $(NDIF_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

lab: $(VENV)/.lab  ## JupyterLab on the tutorials
	$(BIN)/jupyter lab tutorials

bench: $(VENV)/.runtime  ## ratios against the literal code and TransformerLens
	$(BIN)/python -m benchmarks

constraints:  ## resolve constraints.txt anew (needs uv); then run the tests
	echo 'torch==2.13.0' > .torch-pin
	uv pip compile pyproject.toml --all-extras --group dev --group browser --universal --python-version 3.10 \
	  --no-header --no-annotate -c .torch-pin -o .constraints-new
	( head -n 2 constraints.txt; grep -vE '^(nvidia-|triton|cuda-|torch==)' .constraints-new; echo 'torch==2.13.0' ) > constraints.txt
	rm .torch-pin .constraints-new

clean:
	rm -rf $(VENV) runs build dist
