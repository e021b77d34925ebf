# `make help` lists the targets. Every target can be run again: what is there is reused.
#
# PYTHON names the interpreter, 3.11 or newer, that .venv is made with. After a change to the demo's text or settings,
# `make clean` removes what the last run left.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') $(wildcard build_helper/*.py)
MODEL := .cache/SmolLM2-135M-Instruct
BASE ?= origin/main
BENCH ?=
STUDY ?=
COUNTERS ?=
LOAD ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help demo lint test changed docs bench study compile counters gpu quantized load kills sanitize simt mutants clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/demo $(MODEL)/config.json ## fetch the demo model, compress a text, answer questions about it
	$(BIN)/softprompt compress --config demo/demo.yaml
	$(BIN)/softprompt generate --compare --model $(MODEL) --context demo/handbook.txt --prompt runs/demo/prompt \
		--max-new-tokens 32 \
		"Who opened the cable railway, and when?" "How often is the cable replaced?" "What will open in 2027?"

lint: $(VENV)/test ## check style and types: ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The second run is for the Triton kernels: Triton's interpreter needs a process of its own.
test: lint ## lint, then run all tests; the Triton kernels run in Triton's interpreter
	$(PYTEST) --dist loadfile
	TRITON_INTERPRET=1 $(PYTEST) --dist loadfile -k "triton or counted" \
		tests/kernels tests/ops tests/traps tests/benchmarks

changed: lint ## lint, then run the tests that the changes since BASE (origin/main) need, but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.affected --base $(BASE) -n 2 --dist loadfile

docs: $(VENV)/test ## build the documentation as a site, build/site/index.html, without a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/bench $(MODEL)/config.json ## time and memory of ops and a step (15 min); a part: BENCH="-k attention"
	$(BIN)/python -m pytest -c benchmarks/pytest.ini benchmarks --model $(MODEL) --compile \
		--benchmark-json runs/bench/bench.json $(BENCH)

study: $(VENV)/study $(MODEL)/config.json ## measure ways to make a prompt (3 h); a part: STUDY="--method matched --minutes 30"
	$(BIN)/python -m benchmarks.study $(STUDY)

compile: $(VENV)/test ## compile all Triton kernels for all GPUs, without a GPU, and check the machine code (15 min)
	$(BIN)/softprompt doctor --compile --json runs/compile.json

# The other packages are for comparison, and must not bring their own torch.
counters: $(VENV)/test ## count bytes, FLOP, launches and memory of all ops and peers; a part: COUNTERS="--op kl_div"
	$(BIN)/python -m pip install --quiet --no-deps liger-kernel flash-linear-attention fla-core einops
	$(BIN)/python -m benchmarks.counted $(COUNTERS)

gpu: $(VENV)/test ## on a machine with a GPU: test the ops on it, and time them against other implementations
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python -m benchmarks.device

# In a folder of its own: importing PEFT imports these packages, which takes each process a second.
quantized: $(VENV)/test ## models in 8 and 4 bits: the tests that need bitsandbytes and torchao
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/quantized --constraint constraints.txt bitsandbytes torchao
	PYTHONPATH=build/quantized $(BIN)/python -m pytest tests/compress/sources/test_quantize.py

load: $(VENV)/test ## 64 clients of `softprompt serve` for a minute: right, fast, flat; a part: LOAD="--seconds 10"
	$(BIN)/python -m benchmarks.serve $(LOAD)

KILL_SEEDS ?= 1 2 3
kills: $(VENV)/test ## kill a small run at 20 random moments and resume it, with each of three seeds; it must not show
	for seed in $(KILL_SEEDS); do SOFTPROMPT_KILLS=20 SOFTPROMPT_KILL_SEED=$$seed OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -s tests/compress/process/test_killed_runs.py || exit 1; done

# A copy of the package with its own module, which is found before the installed one. A test that limits the address
# space is left out: AddressSanitizer takes terabytes of it.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
RUNTIMES = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)
sanitize: $(VENV)/test ## test the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, g++)
	SOFTPROMPT_CPU=1 CXX=g++ CXXFLAGS="-O1 -g -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 \
		PYTHONPATH=build/sanitize/lib \
		$(PYTEST) tests/kernels tests/ops tests/traps -k "cpu and not memory_error"

# The second build is checked by the sanitizers and not by csrc/simt: one build cannot have the calls of both.
SIMT_SEEDS ?= 1 2 3
simt: $(VENV)/test ## test the CUDA kernels on the host, with every access checked, in several schedules (Linux, g++)
	SOFTPROMPT_SIMT=1 SOFTPROMPT_CUDA=0 $(BIN)/python setup.py -q build_ext --inplace
	$(PYTEST) tests/simt tests/kernels tests/bench tests/profiling -k "(simt or cuda) and not machine_code"
	for seed in $(SIMT_SEEDS); do SOFTPROMPT_SIMT_SEED=$$seed \
		$(PYTEST) --dist loadfile -k simt tests/ops tests/traps || exit 1; done
	SOFTPROMPT_SIMT=1 SOFTPROMPT_CPU=0 SOFTPROMPT_CUDA=0 CXX=g++ LDFLAGS="$(SANITIZE)" \
		CXXFLAGS="-g -fno-omit-frame-pointer $(SANITIZE)" \
		$(BIN)/python setup.py -q build --build-base build/simt --build-lib build/simt/lib
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 \
		PYTHONPATH=build/simt/lib $(PYTEST) tests/kernels -k "cuda and (four_tiles or dtypes or any_address)"

mutants: $(VENV)/test ## break the CUDA kernels in known ways, and check that the tests notice each (Linux, g++)
	$(BIN)/python -m tests.mutants

clean: ## remove .venv and everything that was built or run
	rm -rf $(VENV) runs build *.egg-info

# torch first and alone, at the pinned version, so that no later package brings another one. On a machine without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves the download of the CUDA libraries.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --editable '.[demo]'
	touch $@

# SOFTPROMPT_CPU=1: kernels that do not compile end the tests here. Without it the package installs without them.
$(VENV)/test: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	SOFTPROMPT_CPU=1 $(PIP) --editable '.[demo,test]'
	touch $@

$(VENV)/bench: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --editable '.[bench,demo]'
	touch $@

# kvpress asks for an older transformers than ours, which it does not need for what is measured here.
$(VENV)/study: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --editable '.[demo,study]'
	$(PIP) --no-deps kvpress
	touch $@

$(MODEL)/config.json: demo/fetch_model.py | $(VENV)/demo
	$(BIN)/python demo/fetch_model.py --out $(MODEL)
	touch $@
