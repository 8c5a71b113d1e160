PYTHON ?= python3
BIN := .venv/bin
# Without a GPU: make train TORCH_INDEX=https://download.pytorch.org/whl/cpu
PIP := $(BIN)/pip install --quiet $(addprefix --extra-index-url=,$(TORCH_INDEX))
PYTEST = $(BIN)/pytest --numprocesses auto
# Tests start hundreds of processes, which would all compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

train: .venv/installed
	$(BIN)/samestep train

test: .venv/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

# Which lines and branches the tests reach, workers and commands included; of all tests,
# or of TESTS="tests/test_exactness.py ...". The pages are in build/coverage/html.
coverage: .venv/tested
	mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses auto --dist loadgroup $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet --directory build/coverage/html
	$(BIN)/coverage report --sort cover

# 100,000 damaged and malicious inputs for everything that reads, in about half an hour.
fuzz: .venv/tested
	cd tests && ../$(BIN)/python fuzzing.py $(or $(INPUTS),100000) \
		--seed $(or $(SEED),$$(date +%s))

docs: .venv/tested
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs

design-docx: .venv/tested
	$(BIN)/python docs/design/to_word.py build/samestep-design.docx

# The kernels of each are compiled with ziglang; those of macOS and Windows are untried.
WHEELS := manylinux_2_17_x86_64 manylinux_2_17_aarch64 macosx_11_0_x86_64 \
	macosx_11_0_arm64 win_amd64

dist: .venv/tested
	for platform in $(WHEELS); do \
		SAMESTEP_WHEEL=$$platform $(BIN)/python -m build --no-isolation || exit 1; \
	done
	$(BIN)/pytest tests/test_distribution.py

# Compile the kernels for this checkout, after a change of src/samestep/kernels/csrc.
kernels: .venv/installed
	$(BIN)/python -m samestep.kernels.compiling --werror

# The kernels under ASan and UBSan, for every instruction set that this machine has.
sanitize: .venv/tested
	$(PYTEST) tests/test_kernels_runner.py -m "full or not full"

# Every kind of own code in tests/kinds, at every placement and after every kill.
kinds: .venv/tested
	$(PYTEST) tests/test_kinds.py -m "full or not full"

# The functions of portable arithmetic on all floats, on this processor; 10 minutes.
# Some of them: make arithmetic FUNCTIONS="exp or log"
arithmetic: .venv/tested
	$(PYTEST) tests/test_kernels_functions.py -n0 -m "full or not full" -k "$(FUNCTIONS)"

# Modules of other libraries, which are installed beside what the tests need.
zoo:
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/pip install --quiet --constraint constraints.txt --editable .
	.venv-zoo/bin/pip install --quiet --constraint constraints.txt \
		--requirement benchmarks/zoo/requirements.txt
	.venv-zoo/bin/pip install --quiet --no-deps --requirement benchmarks/zoo/alone.txt
	HF_HUB_OFFLINE=1 PYTHONPATH=benchmarks/zoo/stubs \
		.venv-zoo/bin/python benchmarks/zoo/run.py

# The tests with the newest versions that pyproject.toml allows, and the newest torch.
newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --editable ".[dev]"
	.venv-newest/bin/pytest --numprocesses auto

KERNELS := $(wildcard src/samestep/kernels/csrc/*.[ch]) src/samestep/kernels/compiling.py

# With a C compiler, or with that of the PyPI package ziglang, this compiles the kernels.
.venv/installed: pyproject.toml constraints.txt hatch_build.py $(KERNELS)
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable ".[report]"
	touch $@

.venv/tested: .venv/installed
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-zoo build dist

.PHONY: train test coverage fuzz docs design-docx dist newest clean kernels kinds sanitize zoo
