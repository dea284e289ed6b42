# Two commands do everything: `make run` and `make test`. Both make .venv first when it is missing or out of date.
PY    ?= python3
VENV  ?= .venv
BIN    = $(VENV)/bin
P     ?= 04_sharing
SEED  ?= 0
ARGS  ?=
OUT    = reports/demo/notebooks/$(P)-seed$(SEED).ipynb

.PHONY: run test quick paper gpu gpu-slice gpu-wheels evidence docs install sync lint outputs clean

run: install
	@mkdir -p $(dir $(OUT))
	$(BIN)/papermill nbs/$(P).ipynb $(OUT) -p seed $(SEED) $(ARGS) --no-progress-bar --log-output
	@$(BIN)/python -m mammo_nb.runs $(OUT)

paper: run   ## make paper P=04_sharing SEED=1 ARGS="-p preset paper"

# One thread a process: small networks on shared cores lose more by waiting for each other than they gain.
test: export OMP_NUM_THREADS = 1
test: export MPLBACKEND = agg
test: install
	$(BIN)/python tests/lessons.py --jobs 2 nbs/*.ipynb nbs/papers/*.ipynb nbs/lib/*.ipynb   # nbdev_test, a process each; the long ones first
	$(BIN)/pytest --durations=25 -n 2 --dist loadfile --no-loadscope-reorder   # a file's tests share what they made; long files first

# What a change is tried with before it is pushed: contracts, ratchets, sync, lint, the lessons that changed, one paper.
quick: export OMP_NUM_THREADS = 1
quick: export MPLBACKEND = agg
quick: SINCE ?= HEAD
quick: install lint ## make quick SINCE=main: also the lessons changed since a branch or commit
	@mkdir -p reports/demo/notebooks
	$(BIN)/papermill nbs/00_annotation_shift.ipynb reports/demo/notebooks/quick.ipynb -p run_dir reports/demo/quick -p boots 50 --no-progress-bar & \
	$(BIN)/pytest tests/test_notebooks.py tests/test_style.py tests/test_sync.py tests/test_environment.py && \
	(git diff --name-only --diff-filter=d $(SINCE) -- nbs/lib nbs/papers; git ls-files --others --exclude-standard -- 'nbs/*.ipynb') | sort -u | \
	  xargs -r $(BIN)/python tests/lessons.py --jobs 1 && wait $$!

gpu: install   ## on a machine with a GPU: its tests, the benchmarks, five papers at published size, the page; asked again it goes on
	$(BIN)/pytest -m gpu
	@mkdir -p reports/local
	$(BIN)/papermill nbs/90_benchmarks.ipynb reports/local/90_benchmarks.ipynb -p preset paper -p device cuda -p publish auto --no-progress-bar --log-output
	$(BIN)/mammo sweep sweeps/papers_full.yaml --keep
	$(BIN)/mammo report

evidence: install ## the five demos from a committed tree: executed notebooks and pages into reports/ (some 15 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python docs/evidence.py $(ARGS)

docs: install ## all notebooks with their outputs, a search and a reference as a site in _site/, offline
	$(BIN)/python docs/site.py

# A borrowed machine: no network, ten minutes, a few small files back. Packages come as wheels, the kernel is put beside them.
gpu-slice: OUT = gpu-slice
gpu-slice: WHAT ?= tests
gpu-slice: MINUTES ?= 9
gpu-slice: PRESET ?= paper
gpu-slice: export PYTHONPATH = $(CURDIR):$(CURDIR)/.site
gpu-slice: export JUPYTER_PATH = $(CURDIR)/.kernel/share/jupyter
gpu-slice: export MAMMO_NB_CACHE ?= $(CURDIR)/.cache
gpu-slice: ## make gpu-slice MINUTES=9 WHAT=tests|bench|00|01|02|03|04 OUT=folder [WHEELS=folder] [PRESET=demo] [GIVEN="name=value …"]: goes on from what lies in OUT
	[ -z "$(WHEELS)" ] || $(PY) -m pip install -q --no-index --no-deps --no-compile --upgrade --target .site $(WHEELS)/*.whl
	$(PY) -m ipykernel install --prefix .kernel --name python3 >/dev/null
	$(PY) -m mammo_nb.slices --what $(WHAT) --minutes $(MINUTES) --out $(OUT) --preset $(PRESET) --given $(GIVEN)

gpu-wheels: WHEELS ?= wheels
gpu-wheels: ## make gpu-wheels WHEELS=folder: what such a machine lacks (Python 3.12, Linux, x86-64), to be carried there
	$(PY) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(foreach linux,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1,--platform $(linux)_x86_64) -d $(WHEELS) -r docs/gpu_wheels.txt

lint: install ## lines, unused names, imports inside functions, likely bugs; types of the spine
	$(BIN)/ruff check mammo_nb nbs
	$(BIN)/mypy

outputs: install ## make outputs L=nbs/lib/34_metrics.delong.ipynb: run a lesson and keep what its cells show
	$(BIN)/python tests/keep_outputs.py $(L)
	$(BIN)/nbdev_clean --fname $(L)

sync: install lint ## export and clean must leave the tree as it is
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	git diff --exit-code -- nbs mammo_nb

install: $(VENV)/.ready

$(VENV)/.ready: settings.ini pyproject.toml constraints.txt
	$(PY) -c 'import sys; sys.exit(0 if (3,10) <= sys.version_info[:2] <= (3,13) else "mammo_nb needs Python 3.10 to 3.13: make PY=python3.11 run")'
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,notebooks,dicom,privacy,cluster]'
	$(BIN)/python -m ipykernel install --prefix $(VENV) --name python3 >/dev/null
	@touch $@

clean: ## removes results and caches of demos, never reports you committed
	rm -rf .cache reports/demo
