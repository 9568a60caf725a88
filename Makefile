# Every target makes its own .venv from constraints.txt and needs python3 (3.11 or newer) alone; with
# g++ the C++ kernels are built too.
PYTHON ?= python3
BIN := .venv/bin
KERNELS := setup.py $(wildcard custom_ops/kernels/cpu/*)
SANITIZED := build/sanitized

# The tests of the ops on the Triton kernels, which need no device in Triton's interpreter.
TRITON := TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -k
TRITON_SUBSET := tests/test_triton.py tests/test_triton_node.py tests/test_softmax.py \
  tests/test_cross_entropy.py tests/test_inplace.py tests/test_peer_faults.py

.PHONY: demo lm test test-triton test-asan explain bench bench-cuda lint clean

demo: .venv/installed  ## four heads side by side: a table, a report and a picture
	$(BIN)/python scripts/compare.py

lm: .venv/installed  ## a small GPT, the last layer in two steps and in one: memory, time, the same curve
	$(BIN)/python scripts/train_lm.py

explain: .venv/installed  ## the lesson: one image through the chain rule, factor by factor
	$(BIN)/python scripts/explain.py

bench: .venv/installed  ## what the ops cost beside torch's: every claim as a table, JSON and a picture
	$(BIN)/python scripts/benchmark.py

bench-cuda: .venv/installed  ## the same on a GPU, beside other libraries' kernels where they are installed
	$(BIN)/python scripts/benchmark.py --device cuda

test: .venv/installed  ## everything; of the Triton kernels' tests on the CPU what is quick
	$(BIN)/python -m pytest -n auto
	$(TRITON) "triton and not gradcheck and not any_case" $(TRITON_SUBSET)

test-triton: .venv/installed  ## all tests of the ops on the Triton kernels, in the interpreter
	$(TRITON) triton tests

# The sanitizers' libraries come first in the process, before python's own malloc; leaks are not
# looked for, as python and torch keep what they have until the end.
test-asan: .venv/installed  ## the tests of the C++ kernels, on a build that checks every access
	CUSTOM_OPS_SANITIZE="$$($(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')" \
	  $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) \
	  --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib \
	  $(BIN)/pytest -n auto tests/test_native.py tests/test_inplace.py tests/test_cross_entropy.py \
	  tests/test_softmax.py tests/test_peer_faults.py -k "not older_processor and not eager"

lint: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build custom_ops/kernels/*.so

.venv/installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[train,test,lint]"
	touch $@
