# Every task works on a fresh machine: it makes the environment that it needs, and finds it made the
# next time. `make gpu` alone installs nothing, since a machine with a GPU often has no network.

PYTHON  ?= python3
MINUTES ?= 10
OUT     ?= build/gpu

RUN      := .venv/bin/python -m
SANITIZE := .venv-sanitize/bin/python -m

# $(call step,NAME,COMMAND): run COMMAND; if it fails, say what it was that failed, and stop.
step = @printf '\n=== %s\n' '$(1)'; $(2) || { printf '\n*** FAILED: %s\n' '$(1)' >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/demo vitkern/kernels  ## train a small ViT on a small data set, and watch it
	$(RUN) vitkern demo

test: lint .venv-sanitize/made  ## all checks that need no GPU: lint, tests, offline compile, memory safety
	@mkdir -p build
	$(call step,tests,OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadfile)
	$(call step,every kernel compiles for sm_80 and sm_90,\
		$(RUN) benchmarks offline --arch 80 90 --json build/offline.json)
	$(call step,the same with Triton 3.6,\
		$(SANITIZE) benchmarks offline --arch 80 90 --json build/offline-triton36.json)
	$(call step,the memory-safety gate finds a missing mask,\
		$(SANITIZE) pytest -q tests/test_gates.py -k symbolically)
	$(call step,no kernel leaves its tensors,$(SANITIZE) benchmarks sanitize)
	@printf '\nall checks passed\n'

lint: .venv/test vitkern/kernels  ## ruff and mypy
	$(call step,ruff check,$(RUN) ruff check)
	$(call step,ruff format (mend with `make format`),$(RUN) ruff format --check)
	$(call step,mypy,$(RUN) mypy)

format: .venv/test  ## lay the code out, and mend what ruff can mend by itself
	$(RUN) ruff check --fix-only
	$(RUN) ruff format

bench: .venv/bench .venv/peers vitkern/kernels  ## ours beside all others, with or without a GPU; a report
	$(RUN) pytest benchmarks --benchmark-only

gpu: vitkern/kernels  ## everything that needs a GPU; PYTHON=... MINUTES=10 OUT=build/gpu STEPS=...
	$(PYTHON) -m benchmarks gpu --minutes $(MINUTES) --out $(OUT) $(if $(STEPS),--steps $(STEPS))

clean:  ## remove what the tasks above made
	rm -rf .venv .venv-sanitize build dist runs *.egg-info vitkern/kernels kernels/native/*.so
	rm -rf .benchmarks .mypy_cache .pytest_cache .ruff_cache
	find vitkern kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# An environment with the extra of the same name. All are one folder, so the last one adds.
.venv/demo .venv/bench .venv/peers .venv/test: .venv/%: pyproject.toml setup.py
	@printf '\n=== installing .[$*] into .venv\n'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# The memory-safety gate runs on triton-viz, which works with this Triton and this numpy only.
# Triton comes last and alone: most builds of torch insist on another one, which no gate needs.
.venv-sanitize/made: Makefile
	@printf '\n=== installing triton-viz into .venv-sanitize\n'
	test -x .venv-sanitize/bin/pip || $(PYTHON) -m venv .venv-sanitize
	$(SANITIZE) pip install --quiet --disable-pip-version-check \
		torch==2.13.0 'numpy<2.3' triton-viz==3.0 pytest
	$(SANITIZE) pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
	@touch $@

# The checkout as it will be once installed: Python, run from here, and mypy find vitkern.kernels.
# An editable install would do for Python, but not for mypy, nor where nothing can be installed.
vitkern/kernels:
	ln -s ../kernels $@
