# make demo   install into .venv, fetch the demo model, compress a text, answer questions about it
# make test   install what tests need, lint, type-check, test; then the Triton kernels, in Triton's interpreter
# make bench  time and memory of the ops and of a training step, against their floors and other ways of writing them;
#             a quarter of an hour on two cores. BENCH="-k attention" and the like measures a part
# make compile  compile every Triton kernel for every GPU it is configured for, which needs none, and check the code; a
#             quarter of an hour
# make counters  count bytes, FLOP and memory of the Triton kernels, in their interpreter, against floors and other
#             packages
# make gpu    on a machine with a GPU: the tests of the ops on it, and their times against other ways
# make sanitize  run the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, g++)
# make simt   run the tests of the CUDA C++ kernels on the host, checked access by access, under several schedules (Linux,
#             g++); with nvcc, check its code too
# make mutants  break these kernels in known ways, one after the other, and see that the tests notice
#
# Every target can be run again; what is there is reused. PYTHON names the interpreter that .venv is made with, 3.11 or
# newer. After a change to the demo's text or settings, `make clean` makes room for another run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
MODEL := .cache/SmolLM2-135M-Instruct
BENCH ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test bench compile counters gpu sanitize simt mutants clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo $(MODEL)/config.json
	$(BIN)/softprompt compress --config demo/demo.yaml
	$(BIN)/softprompt generate --compare --model $(MODEL) --context demo/handbook.txt --prompt runs/demo/prompt \
		--max-new-tokens 32 \
		"Who opened the cable railway, and when?" "How often is the cable replaced?" "What will open in 2027?"

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -k "triton or counters" \
		tests/kernels tests/ops tests/traps tests/benchmarks

bench: $(VENV)/bench $(MODEL)/config.json
	$(BIN)/python -m pytest -c benchmarks/pytest.ini benchmarks --model $(MODEL) --compile \
		--benchmark-json runs/bench/bench.json $(BENCH)

compile: $(VENV)/test
	$(BIN)/softprompt doctor --compile --json runs/compile.json

# The other packages are for comparison alone, and are not to bring their own torch.
counters: $(VENV)/test
	$(BIN)/python -m pip install --quiet --no-deps liger-kernel flash-linear-attention fla-core einops
	$(BIN)/python -m benchmarks.counted

gpu: $(VENV)/test
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python -m benchmarks.device

# A copy of the package with a module of its own, found before the installed one. A test that limits the address space is
# left out: AddressSanitizer takes terabytes of it.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
RUNTIMES = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)
sanitize: $(VENV)/test
	SOFTPROMPT_CPU=1 CXX=g++ CXXFLAGS="-O1 -g -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 \
		PYTHONPATH=build/sanitize/lib \
		$(BIN)/pytest tests/kernels tests/ops tests/traps -k "cpu and not memory_error"

# Sanitizers check what a kernel does on the host beyond csrc/simt's own checks, whose calls cannot be built in beside them.
SIMT_SEEDS ?= 1 2 3
simt: $(VENV)/test
	SOFTPROMPT_SIMT=1 SOFTPROMPT_CUDA=0 $(BIN)/python setup.py -q build_ext --inplace
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/simt tests/kernels -k "simt or cuda"
	for seed in $(SIMT_SEEDS); do SOFTPROMPT_SIMT_SEED=$$seed OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 --dist loadfile -k simt tests/ops tests/traps || exit 1; done
	SOFTPROMPT_SIMT=1 SOFTPROMPT_CPU=0 SOFTPROMPT_CUDA=0 CXX=g++ LDFLAGS="$(SANITIZE)" \
		CXXFLAGS="-g -fno-omit-frame-pointer $(SANITIZE)" \
		$(BIN)/python setup.py -q build --build-base build/simt --build-lib build/simt/lib
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 \
		PYTHONPATH=build/simt/lib $(BIN)/pytest tests/kernels -k "cuda and (four_tiles or dtypes or anywhere)"

mutants: $(VENV)/test
	$(BIN)/python -m tests.mutants

clean:
	rm -rf $(VENV) runs build *.egg-info

# torch first and alone, at the pinned version: nothing after it pulls another one. On a machine without a GPU,
# PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU builds spares the CUDA libraries.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --editable '.[demo,test]'
	touch $@

$(VENV)/bench: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --editable '.[bench,demo]'
	touch $@

$(MODEL)/config.json: demo/fetch_model.py | $(VENV)/demo
	$(BIN)/python demo/fetch_model.py --out $(MODEL)
	touch $@
