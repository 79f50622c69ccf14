# `make help` lists the targets.

SHELL := /bin/sh
PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || echo 2)
TARGET ?= results/quickstart/success.csv
BIN := .venv/bin
SMK := Snakefile workflow/Snakefile workflow/rules
# Where to find Mesa, if set-up had to unpack it for a user who may not install packages.
ENTER := test ! -f .tools/environment || . ./.tools/environment;

# Every job is a Python of its own: let the first one keep what it compiles, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test check lint format docs dag report doctor clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup:  ## make the environments and see to a Vulkan device
	@$(PYTHON) envs/setup.py

quickstart: setup  ## demonstrations to success table of a tiny Pi0.5, on this machine
	@$(ENTER) $(BIN)/snakemake --cores $(CORES) quickstart

test: setup lint  ## lint, types and all tests
	@$(PYTHON) envs/setup.py --slurm
	$(ENTER) $(BIN)/python -m pytest -n 2 --dist loadfile

check: setup  ## the fast tests: no simulator, no model
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not simulator and not slow"

lint: setup  ## style, spelling and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check $(SMK)
	$(BIN)/codespell
	$(BIN)/pyright
	$(BIN)/python tests/lint_workflow.py

format: setup  ## bring all code into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt $(SMK)

docs: setup  ## write config/README.md and config/schema.json from the code
	PYTHONPATH=workflow $(BIN)/python -m demo2eval.config readme > config/README.md
	PYTHONPATH=workflow $(BIN)/python -m demo2eval.config schema > config/schema.json

dag: setup  ## print the jobs of TARGET and what they wait for, for mermaid.live
	@$(BIN)/snakemake $(TARGET) --dag mermaid-js | PYTHONPATH=workflow $(BIN)/python -m demo2eval.fold_dag

report: setup  ## write report.html of all finished runs
	@$(ENTER) $(BIN)/snakemake --cores $(CORES) report
	@$(BIN)/snakemake report --report report.html

doctor:  ## say what this machine has, and what that lets you do
	@$(ENTER) PYTHONPATH=workflow $$(command -v $(BIN)/python || echo $(PYTHON)) -m demo2eval.doctor

clean:  ## remove the environments and tools; results stay
	rm -rf .venv envs/planning/.venv .tools
