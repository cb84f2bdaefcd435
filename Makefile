# Linux, CPython 3.11, no GPU.
#
# make setup   a pinned environment in .venv (minutes the first time, seconds while the pins stay the same)
# make test    setup, then the whole test suite
# make demo    setup, then the main job: generate, capture, probe, draw, into demo/
# make demo-serve   setup, then the page on what the demo has made, until Ctrl-C: it prints the address and a key
# make clean   what the others built, .venv included

PYTHON ?= python3.11
PINS := requirements/cpu-torch.txt requirements/cpu.txt requirements/cpu-no-deps.txt pyproject.toml

# Named by what is in the pins, not by their dates: a checkout changes dates.
STAMP := .venv/.setup-$(shell cat $(PINS) | sha256sum | cut -c1-16)
PIP := .venv/bin/python -m pip --disable-pip-version-check install
TORCH_CPU := https://download.pytorch.org/whl/cpu

.PHONY: setup test demo demo-serve clean

setup: $(STAMP)

# pip calls a package installed once its metadata lie there, even when it was stopped before the last file.
# So an interrupted setup starts again from nothing; a change of pins only installs what changed.
$(STAMP): | $(PINS)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found: install Python 3.11, or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if [ -e .venv/.unfinished ]; then echo "make: an earlier setup was interrupted: .venv is built again" >&2; rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.unfinished && rm -f .venv/.setup-*
	$(PYTHON) -m venv .venv
	$(PIP) --no-deps -r requirements/cpu-torch.txt \
		|| { echo "make: not found by pip's own index: trying $(TORCH_CPU)" >&2; \
		     $(PIP) --no-deps -r requirements/cpu-torch.txt --index-url $(TORCH_CPU); }
	$(PIP) -r requirements/cpu.txt
	$(PIP) --no-deps -r requirements/cpu-no-deps.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@ && rm .venv/.unfinished

# OpenMP threads on cores that are shared wait for each other in lock-step: the same job of vLLM on 2 cores
# ran at anything from 44 to 770 tokens/s with two threads, and steadily with one.
test demo: export OMP_NUM_THREADS := 1
# vLLM pins its threads to cores by default, also to cores that another process uses.
test demo: export VLLM_CPU_OMP_THREADS_BIND := nobind
# In GiB. Enough for the demo model; vLLM's default is a share of the machine's memory.
test demo: export VLLM_CPU_KVCACHE_SPACE := 1
# The model lies in the environment: nothing is looked for on the network.
test demo: export HF_HUB_OFFLINE := 1
# No usage reports, from vLLM or from what it imports.
test demo: export VLLM_NO_USAGE_STATS := 1
test demo: export DO_NOT_TRACK := 1

# Two at a time: a file's tests share an engine, and an engine has one thread. Then those of the rest, in new processes:
# what engines leave behind in the ones before is 5 GB.
PYTEST := .venv/bin/python -m pytest -q --durations=15 -n 2 --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTEST) tests/engine
	$(PYTEST) --ignore=tests/engine

demo: setup
	.venv/bin/hiddenlake demo --out demo

demo-serve: setup
	@test -d demo/lake || { echo "make: there is no demo yet: make demo" >&2; exit 1; }
	.venv/bin/hiddenlake serve demo/lake

clean:
	rm -rf .venv demo build dist .pytest_cache .hypothesis src/hiddenlake.egg-info
