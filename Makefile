# make demo: from nothing to the figure in out/demo_report, in minutes on a laptop CPU. make test: ruff and the tests.
# Both make the environment .venv first. make gpu: what needs a GPU is measured, with whatever torch there is (gpu.py). What is done already is not done again; a run that was interrupted goes on.

PYTHON ?= python3
VENV = .venv/bin
# --init_from=resume once the run of the folder $(1) has a checkpoint
resume = $(if $(wildcard $(1)/ckpt.pt),--init_from=resume)

# a run that SIGTERM has stopped exits with 0, but not with its last evaluation
ended = tail -n 1 $(1)/metrics.jsonl | grep -q '"iter": 320, "test_loss"'

# make gpu: OUT, MINUTES, STAGES and DEVICE as gpu.py has them; make gpu-data: SOURCE as prepare_owt.py has it
OUT ?= out/gpu
MINUTES ?= 6
STAGES ?= 1,2,3,4,5
DEVICE ?= cuda
SOURCE ?= python

.PHONY: demo test lint gpu gpu-data clean
.DELETE_ON_ERROR:

demo: out/demo_baseline/values.npz out/demo_baseline/trial/trial.png out/demo_control/done out/demo_filtered/done
	$(VENV)/python report.py out/demo_baseline out/demo_control out/demo_filtered --out=out/demo_report

out/demo_baseline/values.npz: data/python/meta.json
	$(VENV)/python train.py config/demo_baseline.py $(call resume,out/demo_baseline)

out/demo_baseline/trial/trial.png: out/demo_baseline/values.npz
	$(VENV)/python trial.py out/demo_baseline

out/demo_control/done: out/demo_baseline/values.npz
	$(VENV)/python train.py config/demo_filtered.py $(call resume,out/demo_control)
	$(call ended,out/demo_control) && touch $@

out/demo_filtered/done: out/demo_baseline/values.npz
	$(VENV)/python train.py config/demo_filtered.py --filter_negative=True $(call resume,out/demo_filtered)
	$(call ended,out/demo_filtered) && touch $@

data/python/meta.json: | .venv/installed
	$(VENV)/python prepare_owt.py --source=python

# the environment if it is there, else a Python that has torch, else the environment is made
with_torch = python=$$(test -x $(VENV)/python && echo $(VENV)/python || echo $(PYTHON)); \
	$$python -c "import importlib.util as u, sys; sys.exit(not u.find_spec('torch'))" 2>/dev/null || \
	{ $(MAKE) .venv/installed && python=$(VENV)/python; } && $$python

gpu:
	@$(with_torch) gpu.py --out="$(OUT)" --minutes=$(MINUTES) --stages=$(STAGES) --device=$(DEVICE)

gpu-data:
	@$(with_torch) gpu.py --pack="$(SOURCE)"

test: .venv/installed-test lint
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n 3 --dist=loadgroup --no-loadscope-reorder -m "not slow"

lint: .venv/installed-test
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

# an environment of another Python than the one that is asked for is made anew
version = $(shell { $(1) -V; } 2>/dev/null)
ifeq ($(origin PYTHON), command line)
ifneq ($(call version,$(VENV)/python), $(call version,$(PYTHON)))
.PHONY: .venv/installed
endif
endif

.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	'$(PYTHON) is Python %d.%d, and 3.11 or later is needed: make PYTHON=python3.12 $(MAKECMDGOALS)' % v[:2])"
	test "$(call version,$(VENV)/python)" = "$(call version,$(PYTHON))" || $(PYTHON) -m venv --clear .venv
	$(VENV)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(VENV)/python -m pip install --quiet -r requirements-test.txt
	touch $@

clean:
	rm -rf out/demo_baseline out/demo_control out/demo_filtered out/demo_report data/python
