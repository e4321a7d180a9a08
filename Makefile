# Everything runs in .venv, which the first target that needs it sets up from pinned versions.
# `make` alone explains.

PYTHON ?= python3
VENV   ?= .venv
TARGET ?= host
MODEL  ?= mobilenetv2
SCHEME ?=
BATCH  ?=
ARGS   ?=

BIN    := $(VENV)/bin
# The stamp's name holds a hash of what is installed: a changed pin installs again, a new date not.
PINS   := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
STAMP  := $(VENV)/.installed-$(PINS)
# NVIDIA's compiler (90 MB) only where a target's kernels need it.
NVRTC  := $(if $(filter cuda jetson-orin,$(TARGET)),$(VENV)/.nvrtc-$(PINS))
INDEX  := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help setup demo build test check bench tune clean

help: ## this list
	@echo 'pocktvm: a PyTorch model in, one .so out that trains on the device.'
	@echo
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 16
	@echo
	@echo '  Variables: TARGET=$(TARGET) MODEL=$(MODEL) SCHEME=$(SCHEME) BATCH=$(BATCH) ARGS=$(ARGS)'
	@echo '             PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV)'
	@echo '             TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU build of torch'
	@echo '  Example:   make build TARGET=rpi4 MODEL=mobilenetv2:width=0.35,image=96 SCHEME=bias:2'

setup: $(STAMP) ## the virtual environment, when its pins changed

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "pocktvm needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo 'no venv module: apt-get install python3-venv'; exit 1; }
	@echo 'setting up $(VENV) (about 1.5 GB; a few minutes the first time)' >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(INDEX) -c constraints.txt -e '.[dev,tune]'
	@rm -f $(VENV)/.installed-* && touch $@

$(VENV)/.nvrtc-$(PINS): $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(INDEX) -c constraints.txt -e '.[jetson]'
	@rm -f $(VENV)/.nvrtc-* && touch $@

demo: $(STAMP) ## compile MobileNetV2 for host and rpi4, train it on real digits, beside PyTorch
	@$(BIN)/python examples/demo.py $(ARGS)

build: $(STAMP) $(NVRTC) ## build/$(TARGET)/<model>/: compile MODEL for TARGET (a no-op when nothing changed)
	@$(BIN)/pocktvm build '$(MODEL)' --target '$(TARGET)' $(if $(SCHEME),--scheme '$(SCHEME)') $(if $(BATCH),--batch '$(BATCH)') $(ARGS)

test: $(STAMP) ## the tests (the full matrices: ARGS="-m slow")
	@$(BIN)/python -m pytest $(ARGS)

check: $(STAMP) ## ruff, mypy and the tests that compile nothing: a minute or two
	@$(BIN)/ruff check pocktvm tests examples benchmarks
	@$(BIN)/mypy pocktvm
	@$(BIN)/python -m pytest -m 'not slow and not emulated and not build and not data' $(ARGS)

bench: $(STAMP) ## training steps beside PyTorch's (ARGS="--workload w1a")
	@$(BIN)/python -m benchmarks.step $(ARGS)

tune: $(STAMP) ## search knobs of MODEL's kernels for TARGET (ARGS="--minutes 10"); builds use them
	@$(BIN)/pocktvm tune '$(MODEL)' --target '$(TARGET)' $(ARGS)

clean: ## what was built (.venv stays; `rm -r .venv` removes it)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
