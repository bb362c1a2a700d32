# Everything runs in .venv, which the first target makes.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
DEMO ?=

LOWERED := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: demo test slow lowered no-compiler lint types docs bench clean

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(RUN) -m hf_softheads demo $(DEMO)

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m "not slow and not gpu and not network"

slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m "slow"

# The test command as on other machines: a processor without AVX-512, with one thread and with two, and no C++ compiler.
lowered: lowered-1 lowered-2 no-compiler

lowered-%: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$* $(LOWERED) $(RUN) -m pytest -m "not slow and not gpu and not network" --processor=avx2

no-compiler: $(STAMP)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m "not slow and not gpu and not network" --no-compiler

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

clean:
	rm -rf $(VENV) build dist demo_output runs .pytest_cache .mypy_cache .ruff_cache
