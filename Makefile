# make setup   everything into .venv
# make demo    all tiers on this machine, one question, its answer and where the time went; then serves on :8000
# make test    what continuous integration runs
# make builtin-model   trains tandem/builtin afresh and scores it; may be interrupted and run again
# make faults  every stage of a request × every fault; writes docs/faults.md

PYTHON ?= python3
VENV := .venv

.PHONY: setup demo test faults docs builtin-model clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml scripts/setup
	PYTHON="$(PYTHON)" scripts/setup

demo: setup
	$(VENV)/bin/python -m tandem demo

test: setup
	scripts/check

faults: setup
	FAULTS=all $(VENV)/bin/python -m pytest tests/faults --timeout 600

# Every batch has a core of its own; oneDNN keeps a kernel per shape.
builtin-model: setup
	OMP_NUM_THREADS=1 ONEDNN_PRIMITIVE_CACHE_CAPACITY=8192 $(VENV)/bin/python -m training
	mkdir -p tandem/builtin
	cp -R .cache/builtin-model/out/. tandem/builtin/
	$(VENV)/bin/python -m training.evaluate --model tandem/builtin --card tandem/builtin/README.md --count 500

docs: setup
	$(VENV)/bin/python scripts/configuration.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
