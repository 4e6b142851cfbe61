VENV ?= .venv
PYTHON ?= python3
.PHONY: quickstart codebook test docs

quickstart: $(VENV)/.installed
	$(VENV)/bin/python scripts/quickstart.py $(ARGS)

codebook: $(VENV)/.installed
	$(VENV)/bin/python scripts/testbed.py images outputs/images --count 48
	$(VENV)/bin/rbl build --model codebooks/digits-llava-next --images outputs/images --recipe digits --out outputs/codebook --dtype float32 --keep-ratio 0.15 $(ARGS)
	$(VENV)/bin/python scripts/quickstart.py --model codebooks/digits-llava-next --codebook outputs/codebook --image outputs/images/00000.png --prompt "which digits are there?"

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(ARGS)

docs: $(VENV)/.installed
	$(VENV)/bin/python -m mkdocs build --strict $(ARGS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -e ".[test]"
	touch $@
