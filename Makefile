# make chat            talk with the bundled model (MODEL=Qwen/Qwen3-0.6B or a folder takes a real one)
# make test            the default tests, offline
# make check           ruff, mypy and the floors of ARCHITECTURE.md
# make finetune-demo   give the bundled model a new identity: adapter, merge, int8, chat (minutes)
# make native-check    the kernels of csrc/ under AddressSanitizer, UBSan and ThreadSanitizer (two minutes)
# make clean           remove what make has made
# Needs python3 >= 3.11 and nothing else. A GPU user puts another torch into .venv first, or makes .venv with
# --system-site-packages: a torch that pyproject.toml accepts is left alone.

PYTHON ?= python3
VENV ?= .venv
TORCH = torch==2.13.0
DONE = $(VENV)/.made
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

# $(call quietly,what it is,command): one line on stderr; the command's own output only when it fails.
quietly = echo "$(1)" >&2; $(2) >$(DONE)/log 2>&1 </dev/null || { cat $(DONE)/log >&2; exit 1; }

# On a terminal the chat gets a process group of its own, so that Ctrl-C reaches it and not make.
.PHONY: chat
chat: $(DONE)/kiloq
	@if [ -t 0 ]; then set -m; fi; $(VENV)/bin/kiloq chat $(if $(MODEL),-m "$(MODEL)")

.PHONY: test
test: $(DONE)/test
	@$(VENV)/bin/python -m pytest $(PYTEST)

.PHONY: finetune-demo
finetune-demo: $(DONE)/kiloq
	@PATH="$(abspath $(VENV))/bin:$$PATH" recipes/finetune/demo/run.sh

.PHONY: check
check: $(DONE)/test $(DONE)/check
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-logo

# Built apart from the installed kernels, once per sanitizer; csrc/check/ drives them through their C interface. A call
# for each access, and no watch over what temporaries go out of scope: inline checks take five times as long to compile.
CHECKS = build/check/address build/check/thread
build/check/address: SANITIZE = -g -O1 -fsanitize=address,undefined -fno-sanitize=null -fno-sanitize-recover=all \
  -fno-sanitize-address-use-after-scope --param asan-instrumentation-with-call-threshold=0
build/check/address: SYMBOLS = __asan_load __ubsan_handle
build/check/thread: SANITIZE = -g -O1 -fsanitize=thread
build/check/thread: SYMBOLS = __tsan_read

.PHONY: native-check $(CHECKS)
native-check: $(CHECKS)

$(CHECKS): $(DONE)/venv
	@$(call quietly,Preparing to build the kernels for $@ ...,$(PIP) install 'setuptools>=77')
	@KILOQ_CXXFLAGS='$(SANITIZE)' $(VENV)/bin/python setup.py -q build_ext -b $@ -t $@
	@for object in $@/csrc/*.o; do for symbol in $(SYMBOLS); do \
	  nm $$object | grep -q $$symbol || { echo "$$object is not watched: it has no $$symbol" >&2; exit 1; }; done; done
	@$(CXX) -std=c++17 -Wall -Wextra $(SANITIZE) csrc/check/*.cpp $@/kiloq/ops/_native.so \
	  -Wl,-rpath,$(CURDIR)/$@/kiloq/ops -pthread -o $@/check
	$@/check

.PHONY: clean
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find kiloq tests -name __pycache__ -type d -exec rm -rf {} +

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"kiloq needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}. Name another one: make PYTHON=python3.12 ...")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE)
	@$(call quietly,Preparing $(VENV) ...,$(PIP) install --upgrade 'pip>=25.1')
	@touch $@

# The exact version: a looser wish may bring several GB of CUDA libraries along.
$(DONE)/torch: $(DONE)/venv
	@$(VENV)/bin/python -c 'import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); \
	  assert (2, 11) <= v < (2, 16)' 2>$(DONE)/log || \
	  { $(call quietly,Installing $(TORCH) (once; a minute or two) ...,$(PIP) install $(TORCH)); }
	@touch $@

# Builds the kernels of csrc/ too, where there is a C++ compiler.
$(DONE)/kiloq: pyproject.toml setup.py $(wildcard csrc/*.*) $(DONE)/torch
	@$(call quietly,Installing kiloq and what it needs ...,$(PIP) install --editable .)
	@touch $@

$(DONE)/test: $(DONE)/kiloq
	@$(call quietly,Installing what the tests need ...,$(PIP) install --group test)
	@touch $@

$(DONE)/check: $(DONE)/kiloq
	@$(call quietly,Installing what the checks need ...,$(PIP) install --group check)
	@touch $@
