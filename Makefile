# Every target sets up .venv by itself. PYTHON chooses the interpreter, e.g. make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MINUTES ?= 60
SOAK ?=
LOAD ?=
WORKERS ?= 4
QUESTION ?= A box holds 6 eggs. How many eggs are in 5 boxes?

.PHONY: run test check bench soak flat restart load channel pictures wheel clean

run: $(READY)   ## three agents on a small question, with the embedded model
	$(BIN)/agentmesh run configs/demo.yaml -i question="$(QUESTION)"

# By file name and not by number of tests: test_bench.py, which takes longest, begins early.
test: $(READY)  ## all tests; the slowest are listed at the end
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(READY) ## lint, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(READY) ## two of the figures that README quotes; the others' commands stand beside them
	$(BIN)/agentmesh bench prefix
	$(BIN)/agentmesh bench decode

soak: $(READY)  ## many runs at once for MINUTES, a line a minute; SOAK="--model smollm2-135m --deterministic" for others
	$(BIN)/python tests/soak.py --minutes $(MINUTES) $(SOAK)

flat: $(READY)  ## 300 word problems (DATA=questions.jsonl) through one mesh: memory stays flat, calls share
	$(BIN)/python tests/flat.py $(if $(DATA),--data $(DATA))

restart: $(READY) ## what a restart costs with a store, and what tenants can tell of each other
	$(BIN)/python tests/restart.py

load: $(READY)  ## a server under 32 clients for MINUTES, who go when they like; LOAD="--model smollm2-135m" for others
	$(BIN)/python tests/load.py --minutes $(MINUTES) $(LOAD)

channel: $(READY) ## whether a tenant can tell by time or cached tokens what another one has asked
	$(BIN)/python tests/channel.py

pictures: $(READY) ## the pictures of the live page under docs/, from a real run; needs chromium
	$(BIN)/python tests/page_pictures.py

wheel: $(READY) ## build the wheel and run it from an empty folder
	rm -rf dist
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -q -w dist .
	$(BIN)/python tests/wheel_smoke.py dist

clean:          ## remove everything that was made here
	rm -rf .venv dist build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch hatchling editables
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $(READY)
