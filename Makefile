# Requires Python >= 3.10, make and g++.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The suite and the quickstart give the same results on every machine: they use no hub.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Many processes: each module is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart test test-slow test-all test-multinode test-newest gpu bench check docs format clean

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("lcm-ds needs Python 3.10 or later, %s is %d.%d: make PYTHON=python3.11" % ((sys.executable,) + sys.version_info[:2]) if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart,dev]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/lcm-ds prepare configs/prepare/quickstart.yaml
	$(BIN)/lcm-ds launch --local 2 configs/train/quickstart.yaml
	$(BIN)/lcm-ds evaluate runs/quickstart

# Two files of tests at a time: most of what they do is start processes. Long ones come first (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: $(INSTALLED)
	$(PYTEST) -m 'not slow and not hub' --ignore=tests/multinode

test-slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not hub' --ignore=tests/multinode

# Both, in less time: their tests share runs. TESTS: files, options of pytest.
test-all: $(INSTALLED)
	$(PYTEST) -m 'not hub' --ignore=tests/multinode $(TESTS)

# Hosts in network namespaces, a Slurm cluster and mpirun on this machine. Needs root; installs its packages if there is
# apt-get.
MULTINODE := iproute2 openssh-server pdsh slurm-wlm munge openmpi-bin mpich
test-multinode: $(INSTALLED)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(MULTINODE) >/dev/null 2>&1; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(MULTINODE) >/dev/null; fi
	$(BIN)/python -m pytest -m 'not hub' tests/multinode

# The newest versions that setup.py allows, in a separate environment. For torch pip takes the CUDA build of several GB, even
# on a machine without a GPU.
NEWEST := .venv-newest
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[quickstart,dev]'
	$(NEWEST)/bin/python -m pip list | grep -i -E '^(torch|deepspeed|transformers|numpy) '
	$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile -m 'not slow and not hub' --ignore=tests/multinode

# Whether a GPU computes what it should, and how fast it trains and encodes, in nine minutes: prints tables to send. Without
# one everything runs on the CPU, with small sizes.
gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu/run.py

# The tables of benchmarks/RESULTS.md that two CPU cores can make, each beside its peers, with short settings.
# Nothing else should run.
bench: $(INSTALLED)
	@set -e; for call in \
		"loader.py --seconds 0.5 --concepts 200000" \
		"mixing.py --documents 200000 --rows 64" \
		"train_step.py --steps 5 --ways plain Base-LCM Llama design" \
		"ranks.py --steps 6 --repeats 1" \
		"encode.py --repeats 2" \
		"retrieval.py --repeats 1" \
		"checkpoint.py --stages 1" \
		"generate.py --repeats 1 --rounds 1 --batches 1"; \
	do echo "## benchmarks/$$call"; $(BIN)/python benchmarks/$$call; echo; done

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The guides and the API reference as a site in site/; warnings are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
