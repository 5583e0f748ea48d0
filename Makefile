# make setup   everything into .venv
# make demo    all tiers on this machine, one question, its answer and where the time went; then serves on :8000
# make test    what continuous integration runs

PYTHON ?= python3
VENV := .venv

.PHONY: setup demo test docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml scripts/setup
	PYTHON="$(PYTHON)" scripts/setup

demo: setup
	$(VENV)/bin/python -m tandem demo

test: setup
	scripts/check

docs: setup
	$(VENV)/bin/python scripts/configuration.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
