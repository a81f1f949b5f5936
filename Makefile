# Two commands set everything up on a machine that has Python 3.10 or later, make and a C compiler:
#   make demo    build, check and measure the bundled model on its real test images
#   make test    the tests that a change can break; make test-all adds those that take long
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/vit_digits

.PHONY: demo test test-slow test-all docs lint format bench bench-gpu clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else "Python %d.%d found; tome-export needs 3.10 to 3.13: set PYTHON=" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev,rtx]'
	@# A real tritonserver. Its package holds NumPy below 2 for a Python layer that is not used here, and
	@# its python backend reads arrays as NumPy 1 lays them out: it gets a NumPy of its own.
	{ $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps nvidia-pytriton==0.7.0 && \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $(VENV)/share/tome-export/tritonserver 'numpy<2'; } || \
	  echo "No tritonserver for this machine: the tests that need one are skipped"
	touch $@

# ONNX Runtime for NVIDIA's GPUs as benchmarks/gpu carries it, and a CUDA library that torch lacks, for a
# test that loads them. Not in the environment, where the first would replace the package for CPUs.
$(VENV)/onnxruntime-gpu: scripts/thin_onnxruntime_gpu.py $(VENV)/installed
	{ $(BIN)/python scripts/thin_onnxruntime_gpu.py $(VENV)/share/tome-export/onnxruntime-gpu && \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $(VENV)/share/tome-export/curand 'nvidia-curand==10.*'; } || \
	  echo "No onnxruntime-gpu for this machine: the test that loads it is skipped"
	touch $@

# TensorRT-RTX's plugin provider for ONNX Runtime, for the tests that register it: of no use without an RTX GPU.
$(VENV)/ort-rtx: $(VENV)/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $(VENV)/share/tome-export/ort-rtx \
	  onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 || echo "No TensorRT-RTX provider for this machine: its tests are skipped"
	touch $@

# The browser's ONNX Runtime, which runs under Node as well.
$(VENV)/onnxruntime-web: $(VENV)/installed
	npm install --silent --no-package-lock --no-audit --no-fund \
	  --prefix $(VENV)/share/tome-export/onnxruntime-web onnxruntime-web@1.30.0 || \
	  echo "No onnxruntime-web for this machine: the tests that run it are skipped"
	touch $@

demo: $(VENV)/installed
	$(BIN)/tome-export build vit_digits --r 8 --fp16 --force --output $(OUT)
	$(BIN)/tome-export check $(OUT)

# One thread each: workers that share two cores wait for each other at every barrier. Three, for
# a quarter of the time a test waits for a server or a process of its own.
# Neighbours stay in one worker, which makes their fixtures once; a worker that has no more takes from another.
# Hundreds of the suite's processes import torch: its bytecode is kept, whatever the environment says.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal

TESTED = $(VENV)/installed $(VENV)/onnxruntime-gpu $(VENV)/onnxruntime-web $(VENV)/ort-rtx

test: $(TESTED)
	$(PYTEST) -m "not slow"

# What test leaves out: the full registry, full products of cases, Ray, soak.
test-slow: $(TESTED)
	$(PYTEST) -m slow

test-all: $(TESTED)
	$(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

# The site, in out/site; a link between pages that leads nowhere is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.recipes
	$(BIN)/python -m benchmarks.families
	$(BIN)/python -m benchmarks.llava
	$(BIN)/python -m benchmarks.digits
	$(BIN)/python -m benchmarks.registry

# On a machine with an NVIDIA GPU and a network; benchmarks/gpu/README.md says how to do without one.
bench-gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu.prepare \
	  --python "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
	  --compute-capability "$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0)"
	@# Step 3 runs what steps 1 and 2 left out, so that their status 3 is no failure yet.
	failed=0; for step in 1 2 3; do \
	  $(BIN)/python -m benchmarks.gpu.step$$step; status=$$?; \
	  case $$step-$$status in *-0|1-3|2-3) ;; *) failed=$$status;; esac; \
	done; exit $$failed

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
