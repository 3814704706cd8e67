# Every target does its own set-up into .venv; a second run reuses it. `make help` lists them.
#
#   PYTHON=python3.12 make test    another Python (kept until another is named)
#   TORCH=2.14.1 make build        another torch than the default; what was built against the old one is rebuilt
#   make demo ARGS="--seeds 5"     arguments for the program that the target runs

TORCH ?= 2.13.0
VENV  ?= .venv
ARGS  ?=
# Without a wish of the user's, the Python that .venv was made from.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(if $(and $(wildcard $(VENV)/.python),$(wildcard $(VENV)/bin/python)),$(VENV)/bin/python,python3)
endif

PY          := $(VENV)/bin/python
PIP         := $(PY) -m pip --disable-pip-version-check
CONSTRAINTS := $(VENV)/constraints.txt
# Always run: ninja knows what there is to do.
BUILD       := $(PY) setup.py -q build_ext
# The demos train on the CPU where there is no GPU: there they do not wait for the CUDA library.
BUILD_HERE  := FSAM_CUDA=$${FSAM_CUDA:-gpu} $(BUILD)
SANITIZED   := build/sanitize
# Tests run on one thread each, so as many processes share them as there are processors.
PARALLEL    := -n auto --dist loadgroup
# Nobody waits for ever: a process that dies ends the run, as one in its place might get no work and never end; and so does
# a test of a quarter of an hour, with its traceback. ARGS="-o faulthandler_timeout=0" is for longer ones.
PARALLEL    += --max-worker-restart=0 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true
# Real frameworks, in an environment of their own. Composer asks for an older torch than fsam_ext, so it is installed
# without its requirements, and they by name. Of torchtitan, which asks for a nightly torch, the tests load single files.
FRAMEWORKS  := lightning==2.6.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 timm==1.0.31 torchmetrics==1.7.4 \
               skorch==1.4.0 fastai==2.8.12 pytorch-ignite==0.5.5 keras==3.15.1
COMPOSER    := mosaicml==0.32.1
TORCHTITAN  := torchtitan==0.3.0
COMPOSER_IS := coolname importlib-metadata mosaicml-cli pillow psutil py-cpuinfo pyyaml requests tabulate torch_optimizer
CPP          = $(shell find csrc tests -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo demo-gpt test test-frameworks frameworks house build docs lint format bench bench-full cuda-check gpu-check \
        sanitize wheel wheel-check install-check clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.extra-demo ## train on Fashion-MNIST: plain, SAM, F-SAM, and F-SAM with fewer second passes
	$(BUILD_HERE) --inplace
	$(PY) examples/fashion_mnist.py $(ARGS)

demo-gpt: $(VENV)/.extra-demo ## pre-train small GPTs: does F-SAM at the end lessen forgetting and the damage of 4 bits?
	$(BUILD_HERE) --inplace
	$(PY) examples/gpt.py $(ARGS)

test: $(VENV)/.extra-dev ## run the tests
	$(BUILD) --inplace
	$(PY) -m pytest $(PARALLEL) --durations=10 $(ARGS)

test-frameworks: build ## train with Lightning, Trainer, Accelerate, timm and Composer, in .venv-frameworks; ends with a table
	$(MAKE) VENV=$(VENV)-frameworks frameworks

# The libraries that are built serve any torch: they are not built once more.
frameworks: $(VENV)/.frameworks
	PYTHONPATH=$(CURDIR) $(PY) -m pytest tests/frameworks $(ARGS)

house: $(VENV)/.extra-dev ## the plan of the package in figures, and an interrupt at every line of every kind of step (ten minutes)
	$(BUILD) --inplace
	$(PY) -m tests.house
	$(PY) -m tests.interrupts $(ARGS)

build: $(VENV)/.extra-build ## build the extension in the source tree
	$(BUILD) --inplace

docs: $(VENV)/.extra-docs ## build the site into build/docs; a warning is an error
	$(PY) -m sphinx -q -j auto -W --keep-going -n -b html docs build/docs
	@echo "build/docs/index.html"

lint: $(VENV)/.extra-dev ## check style: ruff and clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.extra-dev ## put the style right
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(VENV)/.extra-bench ## compare with every peer; rows go to bench/results
	$(BUILD) --inplace
	$(PY) bench/run.py $(ARGS)

bench-full: ## every combination; may take an hour
	$(MAKE) bench ARGS="--full $(ARGS)"

cuda-check: $(VENV)/.extra-dev ## registers, spills, vector width and executed instructions of the CUDA kernels
	FSAM_CUDA=1 $(BUILD) --inplace
	$(PY) bench/cuda_check.py $(ARGS)

gpu-check: ## on a GPU, with torch installed already: tests, bandwidth, steps, counters, sanitizers, within nine minutes
	$(PYTHON) bench/gpu_check.py $(ARGS)

# The sanitizers' runtimes have to be loaded before Python's own libraries. libstdc++ comes with them: they look for
# its exception functions when they start, and Python itself does not bring it. pytest must not capture file descriptors,
# or a report that ends the process is lost with it.
sanitize: $(VENV)/.extra-dev ## run the conformance tests, and CUDA's kernels on the CPU, under AddressSanitizer and UBSan
	FSAM_SANITIZE=1 $(BUILD) --build-lib $(SANITIZED)
	preload=$$(ldd $(SANITIZED)/fsam_ext/_C.abi3.so | awk '/lib(asan|ubsan|stdc)/ {printf "%s ", $$3}') && \
	export LD_PRELOAD="$$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  FSAM_LIBRARY_DIR=$(CURDIR)/$(SANITIZED)/fsam_ext && \
	$(PY) -m pytest $(PARALLEL) --capture=sys -k "cpu-" tests/test_conformance.py tests/test_reuse_ops.py \
	  tests/test_reuse_updates.py $(ARGS) && \
	$(PY) -m pytest $(PARALLEL) --capture=sys tests/test_held.py tests/test_watch.py $(ARGS)
	$(PY) -m pytest -m sanitizers tests/test_cuda_emulator.py

wheel: $(VENV)/.extra-wheel ## a wheel for any Linux, Python and torch, and an sdist, in dist/
	$(PY) -m build_tools.wheel

wheel-check: $(VENV)/.extra-wheel ## install the wheel of dist/ into clean environments of several Pythons and torches
	$(PY) -m build_tools.check_wheel $(ARGS)

install-check: $(VENV)/.extra-wheel ## pip install with and without isolation, torch, a compiler, from the sdist: a few minutes
	$(PY) -m build_tools.check_install $(ARGS)

clean: ## remove what the targets above have made, .venv included
	rm -rf build dist *.egg-info $(VENV) $(VENV)-frameworks .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fsam_ext build_tools tests bench examples -name __pycache__ -prune -exec rm -rf {} +
	rm -f fsam_ext/*.so

# Stamps. Each holds what it was made for and is rewritten only when that changes, so what follows is redone only then.

$(VENV)/.python: FORCE
	@id=$$($(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10); print(sys.base_prefix, *sys.version_info[:3])') \
	|| { echo "fsam_ext: Python 3.10 or later is needed, and $(PYTHON) is not; name one with PYTHON=." >&2; exit 1; }; \
	if [ "$$id" != "$$(cat $@ 2>/dev/null)" ]; then \
	    $(PYTHON) -m venv --clear $(VENV) && printf '%s\n' "$$id" > $@; \
	fi

# torch comes first and alone, by its exact version; from then on the constraints keep it.
$(VENV)/.torch: $(VENV)/.python FORCE
	@if [ "$(TORCH)" != "$$(cat $@ 2>/dev/null)" ] || [ $(VENV)/.python -nt $@ ]; then \
	    echo "Installing torch $(TORCH) into $(VENV)" && \
	    $(PIP) install "torch==$(TORCH)" && \
	    $(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(CONSTRAINTS) && \
	    printf '%s\n' "$(TORCH)" > $@; \
	fi

# The first of these to run also puts the source tree on the environment's path. It compiles nothing: pip would do so in
# silence, and the targets build what they need.
$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -c $(CONSTRAINTS) "setuptools>=77" "ninja>=1.11"
	FSAM_CPU=0 FSAM_CUDA=0 $(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation -e ".[$*]"
	@touch $@

# What cannot be installed is said here, and once more under the table.
$(VENV)/.frameworks: $(VENV)/.torch Makefile
	$(PIP) install -q -c $(CONSTRAINTS) "pytest>=8" numpy scikit-learn matplotlib
	@for package in $(FRAMEWORKS); do \
	    $(PIP) install -q -c $(CONSTRAINTS) $$package || echo "fsam_ext: $$package COULD NOT BE INSTALLED" >&2; \
	done
	@$(PIP) install -q --no-deps $(COMPOSER) && $(PIP) install -q -c $(CONSTRAINTS) $(COMPOSER_IS) \
	|| echo "fsam_ext: $(COMPOSER) COULD NOT BE INSTALLED" >&2
	@$(PIP) install -q --no-deps $(TORCHTITAN) || echo "fsam_ext: $(TORCHTITAN) COULD NOT BE INSTALLED" >&2
	@touch $@

.PRECIOUS: $(VENV)/.extra-%
