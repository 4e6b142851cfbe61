VENV ?= .venv
PYTHON ?= python3
.PHONY: quickstart test

quickstart: $(VENV)/.installed
	$(VENV)/bin/python scripts/quickstart.py $(ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(ARGS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -e ".[test]"
	touch $@
