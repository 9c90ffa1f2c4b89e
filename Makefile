# Every target creates .venv and installs what it needs on first use; `make help` lists them.
#
#   make compile MODEL= QUANT= PROFILE= OUT=      OUT is the bundle
#   make generate PROMPT= OUT= BUNDLE=            OUT is the picture
#   make compare MODEL= LEVELS= OUT=              OUT is the report's folder

PYTHON ?= python3
REFERENCE = benchmarks/reference_model/model

MODEL ?= $(REFERENCE)
QUANT ?=
PROFILE ?=
LEVELS ?= none,int8,int4
PROMPT ?= a large red circle in the centre, on a plain blue background

NAME = $(if $(filter $(REFERENCE),$(MODEL)),reference,$(basename $(notdir $(MODEL))))
BUNDLE ?= out/$(NAME)-$(or $(QUANT),auto)

# The extra for this machine: cuda where an NVIDIA driver answers, else cpu.
ACCELERATOR := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
# OpenVINO, the default backend on processors, isn't part of the cuda extra.
ALSO_cuda = openvino

VENV = .venv
RUN = $(VENV)/bin
PIP_INSTALL = $(RUN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL = help
.PHONY: help setup compile generate compare bench test test-faults lint clean
.PRECIOUS: $(VENV)/with-%

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(VENV)/with-compile ## Create .venv with what compile and generate need

compile: OUT ?= $(BUNDLE)
compile: $(VENV)/with-compile ## Compile MODEL for this machine and make one picture with it
	$(RUN)/kiln compile "$(MODEL)" -o "$(OUT)" $(if $(QUANT),--quant $(QUANT)) $(if $(PROFILE),--profile $(PROFILE))
	$(RUN)/kiln generate "$(OUT)" --prompt "$(PROMPT)" -o "$(OUT).png"

generate: OUT ?= out/picture.png
generate: $(VENV)/with-compile ## Make a picture of PROMPT with the bundle BUNDLE
	$(RUN)/kiln generate "$(BUNDLE)" --prompt "$(PROMPT)" -o "$(OUT)"

compare: OUT ?= out/compare-$(NAME)
compare: $(VENV)/with-bench ## Compare LEVELS of MODEL with plain diffusers: speed, size, pictures
	$(RUN)/kiln compare "$(MODEL)" --levels $(LEVELS) -o "$(OUT)"

bench: $(VENV)/with-bench ## Measure speed, size and start-up time against the peers
	$(RUN)/kiln bench

test: $(VENV)/with-dev $(VENV)/torchao ## Run the tests
	$(RUN)/python -m pytest

test-faults: $(VENV)/with-dev ## Run the long tests of kills, full disks and damage
	$(RUN)/python -m pytest -m faults

lint: $(VENV)/with-dev ## Check style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

clean: ## Remove .venv and the tools' caches; out/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/with-%: pyproject.toml constraints.txt | $(RUN)/pip
	@echo "Installing what '$*' needs on a $(ACCELERATOR) machine: minutes the first time"
	$(PIP_INSTALL) --editable ".[$*,$(ACCELERATOR)]" $(ALSO_$(ACCELERATOR))
	touch $@

# Beside the environment, for the tests that ask for it: diffusers imports all of it where it can.
$(VENV)/torchao: $(VENV)/with-dev
	$(PIP_INSTALL) --no-deps --upgrade --target $@ torchao
	touch $@

$(RUN)/pip:
	$(PYTHON) -m venv $(VENV)
