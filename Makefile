# `make bench` and `make test` do everything on a fresh machine: they set up .venv, then run.
# A second run installs nothing until pyproject.toml changes.

PYTHON ?= python3
VENV   ?= .venv
# Installed only where the venv sees no torch; a GPU build that is there already stays.
TORCH  ?= 2.13.0
CHECK  ?=
BENCH  ?= --backend all
PYTEST ?= -n 2 --dist worksteal
SANITIZE ?=

PY       := $(VENV)/bin/python
PIP      := $(PY) -m pip --disable-pip-version-check -qq
KEY      := $(shell cksum < pyproject.toml | cut -d' ' -f1)
RUNTIME  := $(VENV)/.runtime-$(KEY)
TESTING  := $(VENV)/.testing-$(KEY)
TRITON36 := .venv-triton36

# `make test-torch TORCH=VERSION` runs these in a venv of their own: all that depends on torch and not on the kernels.
VERSIONED      := .venv-torch-$(TORCH)
VERSIONED_KEY  := $(VERSIONED)/.installed-$(KEY)
ROWS_OF_TORCH  := tests/torch_contract $(addprefix tests/test_,autograd.py calls.py direct.py distributed.py native.py \
                    nn.py operators.py opinfo.py registration.py second.py strides.py torch_private.py wrapped.py)

# `make contract-table TORCH=VERSION` writes this page from a run of every row of the contract on every backend.
CONTRACT_TABLE := docs/torch_contract/torch-$(basename $(TORCH)).md

# `make quick` runs these, and of test_stages.py every stage in float32 alone: what most mistakes show in.
QUICK      := tests/torch_contract $(addprefix tests/test_,calls.py chains.py direct.py layout.py nn.py ranges.py \
                registry.py stages.py)
QUICK_PART := "not test_stages or float32 and not beyond_float32 or three_tables or complete"

export DUALOP_CACHE_DIR ?= $(CURDIR)/.cache/dualop

.PHONY: test quick test-torch contract-table test-gpu sanitize bench lint venv clean
.DEFAULT_GOAL := test

test: lint $(TRITON36)/.installed
	DUALOP_INTERPRET=1 DUALOP_TRITON36=$(CURDIR)/$(TRITON36) $(PY) -m pytest $(PYTEST) -m "not gpu"

quick: lint
	DUALOP_INTERPRET=1 $(PY) -m pytest $(PYTEST) -x -m "not gpu and not slow" -k $(QUICK_PART) $(QUICK)

test-torch: $(VERSIONED_KEY)
	DUALOP_INTERPRET=1 $(VERSIONED)/bin/python -m pytest $(PYTEST) -m "not gpu" $(ROWS_OF_TORCH)

contract-table: $(VERSIONED_KEY)
	DUALOP_INTERPRET=1 $(VERSIONED)/bin/python -m pytest $(PYTEST) tests/torch_contract --table $(CONTRACT_TABLE)

# For a machine with a GPU where nothing can be installed: the python3 that is there, no venv.
test-gpu:
	env -u DUALOP_INTERPRET PYTHONPATH=. $(PYTHON) -m pytest -m gpu

# Every form of kernel under compute-sanitizer, on a machine with a GPU; SANITIZE="--backend cuda" for a part of it.
sanitize:
	env -u DUALOP_INTERPRET PYTHONPATH=. $(PYTHON) tests/sanitize.py $(SANITIZE)

bench: $(RUNTIME)
	$(PY) -m dualop check $(CHECK)
	$(PY) -m dualop bench $(BENCH)

lint: $(TESTING)
	$(PY) -m ruff check .
	$(PY) -m mypy

venv: $(TESTING)

# A python3 that has a CUDA build of torch lends its packages to the venv: pip then installs what is missing and no other
# torch. Where that python3 is a venv's own, --system-site-packages means the packages below it, hence the .pth file.
$(RUNTIME): | pyproject.toml
	@$(PY) -c "" 2>/dev/null || $(MAKE) --no-print-directory fresh-venv
	@$(PY) -c "import torch" 2>/dev/null || { echo "installing torch $(TORCH)"; $(PIP) install "torch==$(TORCH)"; }
	@echo "installing dualop and what it needs"
	@$(PIP) install "setuptools>=77"
	@$(PIP) install --no-build-isolation -e .
	@touch $@

.PHONY: fresh-venv
fresh-venv:
	@$(PYTHON) -c "import sys; sys.version_info < (3, 10) and sys.exit('dualop needs Python 3.10 or newer')"
	@if $(PYTHON) -c "import sys, torch; sys.exit(not torch.version.cuda)" 2>/dev/null; then \
	    echo "making $(VENV) with the packages of $(PYTHON)"; \
	    $(PYTHON) -m venv --clear --system-site-packages $(VENV) && \
	    $(PYTHON) -c "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')" \
	        > "$$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/lent.pth"; \
	else echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi

$(TESTING): $(RUNTIME)
	@echo "installing what the tests need"
	@$(PIP) install --no-build-isolation -e ".[test]"
	@touch $@

# The kernels are compiled with the oldest supported Triton too; it lies aside, so that the newest stays in the venv.
$(TRITON36)/.installed: | $(RUNTIME)
	@echo "installing triton 3.6.0 into $(TRITON36)"
	@rm -rf $(TRITON36)
	@$(PIP) install --no-deps --target $(TRITON36) triton==3.6.0
	@touch $@

$(VERSIONED_KEY): | pyproject.toml
	@echo "making $(VERSIONED) with torch $(TORCH)"
	@$(PYTHON) -m venv --clear $(VERSIONED)
	@$(VERSIONED)/bin/python -m pip --disable-pip-version-check -qq install "torch==$(TORCH)" "setuptools>=77"
	@$(VERSIONED)/bin/python -m pip --disable-pip-version-check -qq install --no-build-isolation -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-torch-* $(TRITON36) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
