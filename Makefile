# Everything here sets itself up: it needs Python 3.11 to 3.13, and a package index.
# A second run reuses the environment (.venv) and the model (.models).
.PHONY: help setup lint check-seam test docs reference robustness demo clean
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL := .models/smollm2-135m
INSTALLED := .venv/.installed
UV := .venv/bin/uv

# uv does not read pip's setting for local wheels. Without local wheels, torch comes from its own CPU index.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
ifndef UV_FIND_LINKS
export UV_TORCH_BACKEND ?= cpu
else ifeq ($(wildcard $(addsuffix /torchvision-*,$(UV_FIND_LINKS))),)
# Local wheels of torch alone: PyPI's torchvision would not match them.
export UV_OVERRIDE ?= .ci/local-torch.txt
endif

help:
	@echo "make demo   a dozen requests in a small KV pool, stock vLLM against KvLLM, live"
	@echo "make test   lint, types and tests"
	@echo "make robustness  random input and faults, the long form"
	@echo "make docs   the documentation as a site, in .site"
	@echo "make reference  the pages of docs/ that are written from the source"
	@echo "make lint   ruff, mypy and codespell alone"
	@echo "make check-seam [VLLM=FOLDER]  what we use of vLLM, against the installed one or FOLDER/vllm"
	@echo "make setup  the environment alone, in .venv"
	@echo "make clean  remove the environment and the caches, not the models"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml .ci/local-torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "KvLLM needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.11"; exit 1; }
	@echo "Installing KvLLM, vLLM and PyTorch for CPUs into .venv: once, some minutes, about 4 GB ..."
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@test -x $(UV) || .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null # uv makes environments without pip
	@test -x $(UV) || .venv/bin/python -m pip install --quiet uv
	@$(UV) pip install --python .venv/bin/python --editable '.[cpu,dev]'
	@$(UV) pip install --python .venv/bin/python --no-deps kvpress==0.5.5
	@touch $@

$(MODEL)/config.json: | $(INSTALLED)
	@echo "Downloading a small model, SmolLM2-135M-Instruct, and converting it to 0.27 GB in $(MODEL): once ..."
	@PYTHONPATH=src .venv/bin/python -m tools.fetch_model smollm2-135m $(MODEL)

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/codespell

# What src/kvllm/engine/seam.py declares, against our source and a vLLM that need not be importable.
check-seam: $(INSTALLED)
	PYTHONPATH=src .venv/bin/python -m tools.check_seam $(VLLM)

# Two workers with one thread each: engines that spin with two threads each starve one another.
test: lint check-seam $(MODEL)/config.json
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

# Broken links and pages that are in no menu are errors. The variable silences an advertisement of mkdocs-material.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

reference: $(INSTALLED)
	PYTHONPATH=src .venv/bin/python -m tools.reference

# The long form of the random and fault tests: hours, not minutes.
robustness: $(MODEL)/config.json
	KVLLM_LONG=1 KVLLM_TRAFFIC=10000 OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/robustness tests/engine/test_rows.py $(PYTEST_ARGS)

demo: $(INSTALLED) $(MODEL)/config.json
	@.venv/bin/kvllm demo --model $(MODEL) --out build/demo

clean:
	rm -rf .venv build dist .site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info packages/*/build packages/*/*.egg-info
