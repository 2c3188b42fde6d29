# Everything a user types. `make` alone lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

EXPERIMENT ?= toy
# a file of own experiments
CONFIG ?= config.yaml
# of the suite `smoke`: zip-rc, another system, or all
SYSTEM ?= zip-rc
# what is installed, else cpu
ACCELERATOR ?= $(or $(firstword $(patsubst .venv/.installed-%,%,$(wildcard .venv/.installed-*))),cpu)
PYTHON ?= python3
PROFILE ?= default
# SET="a.b=1 c.d=[0, 8]": split at spaces outside of quotes, brackets and braces
SET ?=
TARGET ?=
# 1: run the stages in the image that `make image` built; or the path of an image
CONTAINER ?=
# Where pip finds CPU builds of torch when its own sources have none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
LOCK := containers/requirements/$(ACCELERATOR).txt
STAMP := $(VENV)/.installed-$(ACCELERATOR)
PIP := $(BIN)/python -m pip --disable-pip-version-check
ifeq ($(filter cpu cuda,$(ACCELERATOR)),)
$(error ACCELERATOR is cpu or cuda, found '$(ACCELERATOR)')
endif
# the shell takes SET from the environment, where nothing of it is expanded
export SET
SETTINGS = --config-file '$(CONFIG)' $(if $(SET),--set "$$SET")
OPTIONS = --experiment '$(EXPERIMENT)' $(SETTINGS)
# a bare --container takes the image that the experiment's GPUs call for
HOW = --profile $(PROFILE) $(if $(CONTAINER),--container $(patsubst 1,auto,$(CONTAINER)))
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help install smoke all why unlock verify dag provenance doctor fetch inspect config image stages lint format lock clean
.PHONY: test test-slow test-faults test-cluster test-containers .test-unit .test-beside .slow-params .slow-beside

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make results/smoke/values/train.parquet    one artifact by name"
	@echo
	@echo "  variables: EXPERIMENT=$(EXPERIMENT)  SET=\"train_joint.ziprc.kl=25\"  PROFILE=$(PROFILE)  ACCELERATOR=$(ACCELERATOR)  CONFIG=$(CONFIG)"

install: $(STAMP) ## make .venv from the pinned lock (ACCELERATOR=cpu or cuda)

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Name one with PYTHON=…"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(ACCELERATOR),cpu)
	grep '^torch==' $(LOCK) > $(VENV)/torch.txt
	$(PIP) install --quiet --no-deps -r $(VENV)/torch.txt || $(PIP) install --quiet --no-deps --index-url $(TORCH_INDEX) -r $(VENV)/torch.txt
	$(PIP) install --quiet --no-deps -r $(LOCK)
else
	grep -v '^flash-attn' $(LOCK) > $(VENV)/lock.txt
	$(PIP) install --quiet --no-deps -r $(VENV)/lock.txt
	$(PIP) install --quiet --no-deps --no-build-isolation $$(grep '^flash-attn' $(LOCK))
endif
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-*; touch $@
	@echo "installed $(LOCK) into $(VENV); check it with: make doctor"

smoke: install ## the whole ZIP-RC pipeline, small, in minutes (SYSTEM=… another system, SYSTEM=all every one)
	@ziprc build --suite smoke --system '$(SYSTEM)' $(SETTINGS) $(HOW)

all: install ## everything of EXPERIMENT (default toy)
	@ziprc build $(OPTIONS) $(HOW)

results/%: install ALWAYS
	@ziprc build '$@' $(SETTINGS) $(HOW)

.PHONY: ALWAYS
ALWAYS:

why: install ## what would rerun and why (TARGET=results/… for one artifact)
	@ziprc why $(if $(TARGET),'$(TARGET)' $(SETTINGS),$(OPTIONS)) $(HOW)

unlock: install ## remove the lock of a killed run, unless something of it is alive
	@ziprc unlock $(OPTIONS)

verify: install ## check every digest of EXPERIMENT
	@ziprc verify 'results/$(EXPERIMENT)'

dag: install ## draw the graph of EXPERIMENT as results/EXPERIMENT/dag.md (Mermaid)
	@ziprc dag $(OPTIONS)

provenance: install ## Snakemake's own report of EXPERIMENT (provenance of every artifact)
	@ziprc provenance $(OPTIONS)

inspect: install ## a page of rollouts coloured by what the model expects
	@ziprc inspect 'results/$(EXPERIMENT)'

doctor: ## what is installed, whether it agrees, what to do
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m ziprc.workflow.doctor --accelerator $(ACCELERATOR)

fetch: install ## download models and data of EXPERIMENT beforehand
	@ziprc fetch $(OPTIONS)

config: install ## write docs/config.md and the editors' schema from the descriptions in ziprc/config/
	@python -m ziprc.config.document

image: ## build the container image of ACCELERATOR (BUILDER=docker, podman, buildah or apptainer)
	@ACCELERATOR=$(ACCELERATOR) containers/build.sh

# Two halves, a core each: `unit`, and every other folder. What each has said is shown as a whole when it ends.
test: install ## the tests, under ten minutes
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target .test-unit .test-beside

.test-unit .test-beside:
	@OMP_NUM_THREADS=1 python -m pytest -m "not slow" $(if $(@:.test-unit=),--ignore=tests/unit,tests/unit)

# Two halves as well; the experiment that both start from is built by the first to need it.
test-slow: install ## the long layer: whole workflows, kills, reruns
	@own=$$(mktemp -d); trap "rm -rf $$own" EXIT; export ZIPRC_BUILT=$${ZIPRC_BUILT:-$$own}; \
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target .slow-params .slow-beside

SLOW_HALF := tests/workflow/test_params.py tests/workflow/test_nodes.py
.slow-params .slow-beside:
	@OMP_NUM_THREADS=1 python -m pytest -m "slow and not faults and not cluster and not containers" \
	  $(if $(@:.slow-params=),$(SLOW_HALF:%=--ignore=%),$(SLOW_HALF))

test-faults: install ## every stage through every fault; prints the table of trials
	@OMP_NUM_THREADS=1 python -m pytest tests/workflow -m faults

test-cluster: install ## the workflow on a real SLURM that the tests bring up on this machine
	@OMP_NUM_THREADS=1 python -m pytest tests/cluster -m cluster

test-containers: install ## build both kinds of image and run stages in them
	@OMP_NUM_THREADS=1 python -m pytest -m containers tests/containers

stages: install ## write the table at the head of the Snakefile from the declarations
	@python -m ziprc.workflow.snakefile

lint: install ## style, layers, workflow
	@ruff check . && ruff format --check ziprc tests && lint-imports && snakefmt --check Snakefile && snakemake --lint --config container=any.sif

format: install ## put everything into the one style
	@ruff check --fix-only . ; ruff format ziprc tests; snakefmt Snakefile

lock: install ## resolve the locks again (needs uv)
	@containers/requirements/lock.sh

clean: ## remove the environment; results stay
	rm -rf $(VENV)
