# Everything here sets up what it needs: `make quickstart` and `make test` work in a fresh clone.

PYTHON ?= python3
BIN    := .venv/bin
SETUP  := .venv/setup.done
RUNS   := runs/quickstart
# Half of the cores that this process may use.
HALF    = $(shell $(BIN)/python -c 'import os; print(max(1, len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 2))(0)) // 2))')
# For the packages and, since some are built here, for what builds them.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# glibc keeps freed memory for the next step, where by default it hands large tensors back: a training step of the quickstart's UNet takes
# 1 / 1.1 of the time (seven paired runs on a CPU with AVX2).
export MALLOC_MMAP_THRESHOLD_ := 268435456
export MALLOC_TRIM_THRESHOLD_ := 2147483648

# Tests start many processes, and each would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart quickstart-unet quickstart-dit quickstart-consistency check test test-slow wheel-test lint format setup notebooks docs constraints clean

quickstart: $(SETUP)   ## train, sample, distil and score on handwritten digits; a report of what came out
	OMP_NUM_THREADS=$(HALF) $(MAKE) --no-print-directory --jobs=2 quickstart-consistency quickstart-dit
	$(BIN)/python -m eval experiment=quickstart out=$(RUNS)

# Two trainings side by side, on half of the cores each: small networks use them better than one training on all.
quickstart-unet:
	TQDM_POSITION=0 $(BIN)/python -m train experiment=digits_unet run=$(RUNS)/unet resume=true

quickstart-dit:
	TQDM_POSITION=1 $(BIN)/python -m train experiment=digits_dit run=$(RUNS)/dit resume=true

quickstart-consistency: quickstart-unet
	TQDM_POSITION=0 $(BIN)/python -m train experiment=digits_consistency run=$(RUNS)/consistency model.from=$(RUNS)/unet resume=true

# Of every matrix the cells in which each solver, schedule or family occurs once, and none that a peer is needed for.
check: $(SETUP)        ## what notices most mistakes: the mathematics, solvers, layers, README, and each program once
	OMP_NUM_THREADS=$(HALF) $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile -m "not matrix and not peer" -k "not long_grids" \
	    tests/diffusion tests/samplers/test_contract.py tests/samplers/test_exact.py tests/samplers/test_order.py::test_order_of_convergence \
	    tests/test_layers.py tests/test_readme.py \
	    tests/test_programs.py::test_train_sample_score tests/test_programs.py::test_prompts_to_images_and_again

test: $(SETUP)         ## the test suite: two files side by side, on half of the cores each
	OMP_NUM_THREADS=$(HALF) $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-slow: $(SETUP)    ## at full published size, and whole products of parameters, one after the other: minutes, and 16 GB of memory
	$(BIN)/python -m pytest -m "slow or bench"

wheel-test: $(SETUP)   ## build a wheel, install it into an environment of its own, and train, sample and score with it; no downloads
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

lint: $(SETUP)         ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)       ## mend style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(SETUP)

# Made again when the dependencies change, and otherwise at once done.
$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

notebooks: $(SETUP)    ## run the notebooks again and keep their outputs
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

docs: $(SETUP)         ## the documentation site, in build/docs; a warning is an error, and nothing is fetched
	$(BIN)/python -m sphinx -W --keep-going --quiet -c docs . build/docs
	@echo build/docs/index.html

# Needs every Python that it names on the PATH; each resolves what it would install.
constraints:
	mkdir -p build
	unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT; for v in 3.10 3.11 3.12 3.13; do \
	    python$$v -m pip install --quiet --dry-run --ignore-installed --report build/constraints-$$v.json '.[dev]' || exit 1; done
	$(PYTHON) .ci/constraints.py $$(for v in 3.10 3.11 3.12 3.13; do echo $$v=build/constraints-$$v.json; done) > constraints.txt

clean:                 ## remove the environment; runs are kept
	rm -rf .venv
