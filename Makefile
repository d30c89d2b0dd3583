# Everything runs in .venv, made on first use. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-out
# Constraints hold inside build isolation too; anything else could pull gigabytes of GPU packages.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
NATIVE := $(wildcard CMakeLists.txt edgeattn/runtime_plugins/cpu/CMakeLists.txt edgeattn/runtime_plugins/cpu/*.cpp \
  edgeattn/runtime_plugins/cpu/*.h edgeattn/runtime_plugins/cpu/kernels/*)

# A process per core with one thread each: together they would stand in each other's way.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

CALIB ?= samples/eurosat64/calib
VAL ?= samples/eurosat64/val

.PHONY: install demo test test-all check bench bench-accuracy clean

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "edgeattn needs Python 3.11 or newer, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sh scripts/fetch-ort-headers || echo "Going on without ONNX Runtime headers: the function body runs instead of the plugin (edgeattn doctor)."
	$(BIN)/pip install -q torch
	$(BIN)/pip install -q -e '.[openvino,hub,tensorrt,kernels,test]'
	touch $@

install:
	rm -f $(VENV)/.installed
	$(MAKE) $(VENV)/.installed

demo: $(VENV)/.installed
	BIN=$(BIN) OUT=$(DEMO_OUT) sh scripts/demo

test: $(VENV)/.installed
	$(PYTEST)

test-all: $(VENV)/.installed
	$(PYTEST) -m 'slow or not slow'

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_repository.py

bench: $(VENV)/.installed
	test -d $(DEMO_OUT) || $(MAKE) demo
	$(BIN)/edgeattn bench $(DEMO_OUT) --seconds 60
	$(BIN)/python scripts/compare_plugin.py $(DEMO_OUT)

# Minutes per model and recipe; the rivals are installed first.
bench-accuracy: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python scripts/bench_accuracy.py bench-out --calib $(CALIB) --val $(VAL) --recipe w8a8 --recipe w4a8 --recipe w4a16

clean:
	rm -rf $(VENV) build $(DEMO_OUT) bench-out
