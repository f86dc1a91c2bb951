# Everything here sets up what it needs: `make quickstart` and `make test` work in a fresh clone.

PYTHON ?= python3
BIN    := .venv/bin
SETUP  := .venv/setup.done
RUNS   := runs/quickstart

.PHONY: quickstart test lint format clean setup

quickstart: $(SETUP)   ## train, sample, distil and score on handwritten digits; a report in about five minutes
	$(BIN)/python -m train experiment=digits_unet run=$(RUNS)/unet resume=true
	$(BIN)/python -m train experiment=digits_dit run=$(RUNS)/dit resume=true
	$(BIN)/python -m train experiment=digits_consistency run=$(RUNS)/consistency model.from=$(RUNS)/unet resume=true
	$(BIN)/python -m eval experiment=quickstart out=$(RUNS)

test: $(SETUP)         ## the whole test suite
	$(BIN)/python -m pytest

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:                 ## remove the environment; runs are kept
	rm -rf .venv
