# Everything runs in an environment of its own, made when it is missing or stale:
#   make demo     the main job on a real pretrained model, and real documents
#   make speech   the same on a speech recogniser, and real speech
#   make test     tests and the examples in the documentation
#   make check    format, lint, types, and make test
#   make scaling  time and memory against exact attention and other rivals
#   make pareto   error against time, for many settings
#   make copy     train models on the paper's copy task, about a quarter of an hour on 2 cores
#   make asr      train speech recognisers with each attention, an hour and a half on 2 cores
#   make glue     fine-tune on GLUE's tasks: GLUE=DIR has their folders; about 40 minutes
#   make squad    fine-tune a reader, by folds: SQUAD=FILE is SQuAD's JSON; about 20 minutes
#   make aot      compile kernels and programs for TPUs and GPUs that are not there; hours on 2 cores
#                 (PRESET=quick make aot compiles each kernel for two of them, in minutes)
# Results go to results/. Those in the README are kept in experiments/results:
#   make publish  measures them again there, and writes them into the README
#                 (EXTRAS=dev,bench make publish has PyTorch among the rivals; with GLUE and SQUAD
#                 the fine-tuned models, too)
# PYTHON=python3.12 VENV=.venv-3.12 make test    does the same with another Python.
# TESTS='-m "not once"' make test                leaves out what is slow and the same on any Python.
PYTHON ?= python3
VENV ?= .venv
# Where this is set, each process compiles all it imports anew: half of what it takes to start.
export PYTHONDONTWRITEBYTECODE :=
EXTRAS ?= dev
PRESET ?= full

python := $(VENV)/bin/python
# Python compiles what it imports, which is a small part of what is installed.
install := $(python) -m pip install --quiet --no-compile
version := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
# Neighbours share programs and fixtures: each process begins with tests in a row.
pytest := $(python) -m pytest -n auto --dist worksteal
swap := $(python) -m experiments.pretrained_swap
glue = $(python) -m experiments.glue cpu --data $(GLUE)
squad = $(python) -m experiments.squad cpu --train $(SQUAD)
longer := --tuning.max-tokens 500000 --reverse-tasks MRPC RTE
results := experiments/results
installed := $(VENV)/.installed-$(version)-$(EXTRAS)
# Compilers are out of JAX's sight, or it would look for their accelerators.
compilers := $(VENV)/aot

# An environment whose interpreter has gone is stale, too.
ifneq ($(shell $(python) -c 'print("works")' 2>/dev/null),works)
.PHONY: $(installed)
endif

.PHONY: demo speech test check format scaling pareto copy asr glue squad aot publish clean

demo: $(installed)
	$(swap) text

speech: $(installed)
	$(swap) speech

test: $(installed)
	$(pytest) $(TESTS)

check: $(installed)
	$(python) -m ruff format --check
	$(python) -m ruff check
	$(python) -m pyright
	$(pytest)

format: $(installed)
	$(python) -m ruff format
	$(python) -m ruff check --fix

scaling: $(installed)
	$(python) -m experiments.scaling cpu

pareto: $(installed)
	$(python) -m experiments.pareto

copy: $(installed)
	$(python) -m experiments.copy_task cpu

asr: $(installed)
	$(python) -m experiments.asr_ctc cpu

glue: $(installed)
	$(glue)

squad: $(installed)
	$(squad)

aot: $(compilers)/.installed
	$(python) -m experiments.aot $(PRESET) --compilers $(compilers)

publish: $(installed)
	$(swap) text --seeds 3 --output $(results)/pretrained_swap_text
	$(swap) text --corpus imdb --output $(results)/pretrained_swap_text_imdb
	$(swap) speech --output $(results)/pretrained_swap_speech
	$(swap) speech --model base --prompts 64 --clusters 100 --topk 32 \
	  --output $(results)/pretrained_swap_speech_base
	$(swap) speech --clips pocketsphinx --clusters 100 --topk 32 \
	  --output $(results)/pretrained_swap_speech_clips
	$(python) -m experiments.scaling cpu --output $(results)/scaling
	$(python) -m experiments.scaling paper --output $(results)/scaling_layer
	$(python) -m experiments.breakdown --output $(results)/breakdown
	$(python) -m experiments.pareto --output $(results)/pareto
	$(python) -m experiments.copy_task cpu --output $(results)/copy_task
	$(python) -m experiments.asr_ctc cpu --output $(results)/asr_ctc
	$(if $(GLUE),$(glue) $(longer) --tasks SST-2 MRPC STS-B --trained-with exact --output $(results)/glue)
	$(if $(GLUE),$(glue) $(longer) --tasks MRPC RTE --output $(results)/glue_reverse)
	$(if $(SQUAD),$(squad) --folds 3 --output $(results)/squad)
	$(python) -m experiments.tables

clean:
	rm -rf $(VENV)

$(installed): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(install) --editable '.[$(EXTRAS)]'
	touch $@

$(compilers)/.installed: $(installed)
	rm -rf $(compilers)
	$(install) --no-deps --target $(compilers) \
	  $$($(python) -m experiments.aot.targets)
	touch $@
