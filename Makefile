# Task runner. `make help` lists the tasks; the virtual environment is made by the first that needs it.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: help demo test test-all versions lint docs perplexity report support architectures small-model clean

help:            ## list the tasks
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.dev        ## generate with paged_flash and compare perplexity with eager
	$(BIN)/python -m eval.demo

test: $(VENV)/.dev        ## the whole test suite
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/.dev    ## the same, with all variants and requests of the longest tests: before a release
	HF_PAGED_TESTS=all $(BIN)/python -m pytest -n 2

versions: $(VENV)/.dev    ## the host-facing tests on every minor version of transformers
	$(BIN)/python integration_tests/support/versions.py

lint: $(VENV)/.dev        ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.dev        ## build/docs, the documentation as HTML; a broken link fails
	$(BIN)/pip install -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

perplexity: $(VENV)/.dev  ## the small model's perplexity, every path
	$(BIN)/python -m eval.perplexity --model integration_tests/assets/small_model \
	  --data integration_tests/assets/heldout.txt --attn eager sdpa paged_flash \
	  --path prefill paged_prefill decode --window 256 --stride 128 --max-tokens 4096 --dtype float32

report: $(VENV)/.dev      ## was anything lost? the small model's report and generation check
	$(BIN)/python -m eval.report --model integration_tests/assets/small_model \
	  --data integration_tests/assets/heldout.txt --window 256 --stride 128 --max-tokens 4096 --dtype float32 \
	  --batch-size 8 --output eval/results/report
	$(BIN)/python -m eval.generation --model integration_tests/assets/small_model \
	  --data integration_tests/assets/heldout.txt --dtype float32 --output eval/results/report/generation.json

support: $(VENV)/.dev     ## regenerate eval/results/model_support.md
	$(BIN)/python integration_tests/support/parity.py

architectures: $(VENV)/.dev ## what kernels take on GPUs that are not here: eval/results/architectures.md
	$(BIN)/python integration_tests/support/compile_for_architectures.py

small-model: $(VENV)/.dev ## train the small model again (some minutes)
	$(BIN)/python -m eval.small_model --output integration_tests/assets/small_model

clean:           ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
