# Each target makes the virtual environment it needs and stays in it.
#   make demo | test | test-every-context | lint | fuzz     PYTHON=python3.12 picks another interpreter
PYTHON ?= python3
RESULTS ?= results

# A GPU machine takes the torch it has, or installs a GPU build; any other machine takes the CPU build of one release,
# because a plain "torch" would bring several gigabytes of CUDA libraries.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 || test -e /dev/kfd && echo yes)
HAS_GPU_TORCH := $(shell $(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null && echo yes)
TORCH := $(if $(HAS_GPU),torch>=2.11,torch==2.13.0)
VENV_OPTIONS := $(if $(HAS_GPU_TORCH),--system-site-packages)

PROGRAMS ?= 20000
SEED ?= 0
WORKERS ?= 2

.PHONY: demo test test-every-context lint fuzz clean

demo: .demo-venv/.ready
	.demo-venv/bin/python -m graphs bench --out $(RESULTS)

test: lint
	.venv/bin/python -m pytest -n 2 --dist worksteal tests

test-every-context: .venv/.ready
	.venv/bin/python -m pytest -n 2 --dist worksteal tests --every-context

fuzz: .venv/.ready
	.venv/bin/python -m tests.fuzz --programs $(PROGRAMS) --seed $(SEED) --workers $(WORKERS)

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/.ready: EXTRA = dev
.demo-venv/.ready: EXTRA = bench

%/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_OPTIONS) $*
	$*/bin/python -m pip install -qq "$(TORCH)"
	$*/bin/python -m pip install -qq --editable ".[$(EXTRA)]"
	if [ $(EXTRA) = dev ]; then $*/bin/python -m pip install -qq --no-deps amd-aiter; fi  # its Triton operators, interpreted
	touch $@

clean:
	rm -rf .venv .demo-venv build *.egg-info
