VENV ?= .venv
PYTHON ?= python3
.PHONY: quickstart codebook test docs

quickstart: $(VENV)/.installed
	$(VENV)/bin/python scripts/quickstart.py $(ARGS)

codebook: $(VENV)/.installed
	$(VENV)/bin/python scripts/tiny_checkpoint.py outputs/tiny-model
	$(VENV)/bin/python scripts/photo_crops.py outputs/crops
	$(VENV)/bin/rbl build --model outputs/tiny-model --images outputs/crops --recipe small-grid --out outputs/codebook --keep-ratio 0.2 $(ARGS)
	$(VENV)/bin/python scripts/quickstart.py --model outputs/tiny-model --codebook outputs/codebook

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(ARGS)

docs: $(VENV)/.installed
	$(VENV)/bin/python -m mkdocs build --strict $(ARGS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -e ".[test]"
	touch $@
