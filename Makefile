# make help says what there is.

SHELL := /bin/sh
PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || echo 2)
TARGET ?= results/quickstart/success.csv
BIN := .venv/bin
SMK := Snakefile workflow/rules
# Where to find Mesa, if set-up had to unpack it for a user who may not install packages.
ENTER := test ! -f .tools/environment || . ./.tools/environment;

# Every job is a Python of its own: let the first one keep what it compiles, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test lint format dag doctor clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup:  ## make the environments and see to a Vulkan device
	@$(PYTHON) envs/setup.py

quickstart: setup  ## demonstrations to success table of a tiny Pi0.5, on this machine
	@$(ENTER) $(BIN)/snakemake --cores $(CORES) quickstart

test: setup lint  ## lint, types of files, and all tests
	$(ENTER) $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup  ## ruff and snakefmt, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check $(SMK)

format: setup  ## bring all code into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt $(SMK)

dag: setup  ## draw the rule graph and the jobs of TARGET as SVG into results/dag
	@$(BIN)/python -m demo2eval.draw_graph --target $(TARGET) --output results/dag

doctor:  ## say what this machine has, and what that lets you do
	@$(ENTER) PYTHONPATH=workflow $$(command -v $(BIN)/python || echo $(PYTHON)) -m demo2eval.doctor

clean:  ## remove the environments and tools; results stay
	rm -rf .venv envs/planning/.venv .tools
