# Every target does its own set-up: a virtual environment with the locked versions. `make help` lists them.
# PYTHON=python3.12 picks another Python, in an environment of its own (.venv-3.12).

PRINT_VERSION := import sys; print("%d.%d" % sys.version_info[:2])
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c '$(PRINT_VERSION)' 2>/dev/null)
endif
VERSION := $(if $(PYTHON),$(shell $(PYTHON) -c '$(PRINT_VERSION)' 2>/dev/null))
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

# A finished set-up leaves a stamp named after all that it depends on, so the second time is instant.
KEY := $(VERSION)-$(firstword $(shell cat pyproject.toml constraints.txt | cksum))
CORE := $(VENV)/.ready-core-$(KEY)
DEV := $(VENV)/.ready-dev-$(KEY)

ifneq ($(UV),)
CREATE = $(UV) venv --clear --python $(PYTHON) $(VENV)
ENSURE_PIP = true
INSTALL = $(UV) pip install --python $(BIN)/python -c constraints.txt
else
# Debian's Python has no ensurepip until python3-venv is installed; its own pip then serves the environment.
CREATE = $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || $(PYTHON) -m venv --clear --without-pip $(VENV)
ENSURE_PIP = $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install pip
# Bytecode is made when a module is first imported; making all of TensorFlow's at once takes half of the set-up's time.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
endif

# Tests run on the CPU and share compiled programs between processes and between runs. Their programs compile for seconds and
# run for milliseconds, so they are compiled without the expensive passes; it halves the time. Python 3.11's jax 0.10 also has
# slow fusion emitters that can be turned off; jax 0.12 does not know the flag and refuses to start with it.
TEST_XLA_FLAGS = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
  $(if $(filter 3.11,$(VERSION)),--xla_cpu_use_fusion_emitters=false)
TEST_ENV = DIFFUSION_LM_LOCKED=1 JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2 TF_CPP_MIN_LOG_LEVEL=2 XLA_FLAGS="$(TEST_XLA_FLAGS)"
WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-thorough test-recipes test-interop interop test-aot aot lint format typecheck wheel smoke lock clean

help:  ## Show this list.
	@echo "make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*##/  \1:/p' $(firstword $(MAKEFILE_LIST))

quickstart: $(CORE)  ## Compare AR, diffusion and AR2Diff on three small tasks and write runs/quickstart/report/index.html.
	@echo "==> diffusion-lm compare: finished stages are skipped, an interrupted run continues where it stopped"
	$(BIN)/diffusion-lm compare --gin_file gin/recipes/quickstart.gin --workdir runs/quickstart

test: $(DEV)  ## Run the tests (make test ARGS="tests/unit/core -x" for some of them).
	@echo "==> pytest in $(WORKERS) processes, compiled programs cached in .jax_cache"
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-thorough: $(DEV)  ## Run the tests that take minutes: every method on every layout, laws, several processes, buckets.
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m thorough $(ARGS)

# torch and transformers are no extra of the package: torch pins CUDA packages that are not those of jax[cuda13], and one
# lock cannot hold both. They get an environment of their own. TORCH_INDEX=https://download.pytorch.org/whl/cpu takes
# torch from there, without CUDA.
INTEROP = torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
TORCH_INDEX ?=

test-recipes: $(DEV)  ## Run every recipe at nano scale, from its first stage to its report.
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m recipes $(ARGS) tests/gin

test-interop:  ## Compare imported and exported checkpoints with transformers on PyTorch.
	@$(MAKE) --no-print-directory VENV=$(VENV)-interop interop

interop: $(DEV)
	@$(BIN)/python -c "import torch, transformers, accelerate" 2>/dev/null || { \
	  echo "==> adding $(INTEROP) to $(VENV)"; \
	  $(subst -c constraints.txt,,$(INSTALL)) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(INTEROP); }
	$(TEST_ENV) $(BIN)/python -m pytest $(ARGS) tests/interop

# An environment of its own: where these compilers are installed, JAX looks for their devices first. libtpu reads XLA_FLAGS
# too, and knows other flags.
test-aot:  ## Compile the base network for TPUs and GPUs that are not here, and read what the compilers made of it.
	@$(MAKE) --no-print-directory VENV=$(VENV)-plan aot

aot: $(DEV)
	@$(BIN)/python -c "import libtpu, jax_plugins.xla_cuda13" 2>/dev/null || { echo "==> adding the compilers to $(VENV)"; \
	  $(INSTALL) --no-build-isolation -e ".[plan,plan-gpu]"; }
	DIFFUSION_LM_LOCKED=1 JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m aot $(ARGS) tests/aot

lint: $(DEV)  ## Check format and style (ruff).
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(DEV)  ## Format, and fix what ruff can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(DEV)  ## Check the types of the whole package (mypy).
	$(BIN)/mypy

wheel: $(DEV)  ## Build dist/*.whl.
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

smoke: wheel  ## Install the wheel into a fresh environment outside of the repository and use it there.
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	echo "==> installing the wheel in $$folder"; \
	$(BIN)/virtualenv --quiet "$$folder/env"; \
	"$$folder/env/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt dist/*.whl; \
	cd "$$folder"; \
	env/bin/python -c "import gin; gin.parse_config; import diffusion_lm_tasks"; \
	env/bin/diffusion-lm --help; \
	JAX_PLATFORMS=cpu env/bin/diffusion-lm explain --gin_file gin/recipes/ar2diff_base.gin

lock: $(DEV)  ## Resolve pyproject.toml anew into constraints.txt (for Python 3.11 and later, all extras).
	@command -v uv >/dev/null 2>&1 || test -x $(BIN)/uv || $(BIN)/python -m pip install uv
	PATH="$(CURDIR)/$(BIN):$$PATH" uv pip compile --universal --fork-strategy requires-python --python-version 3.11 \
	  --all-extras --upgrade --no-annotate --no-header pyproject.toml -o constraints.txt

clean:  ## Remove caches and build output; environments and runs stay.
	rm -rf build dist *.egg-info .jax_cache .pytest_cache .ruff_cache .mypy_cache
	find diffusion_lm tasks tests launch -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE):
	@test -n "$(VERSION)" || { echo "No Python 3.11 to 3.13 found; name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "==> setting up $(VENV): Python $(VERSION), $(if $(UV),uv,pip), versions of constraints.txt (the first time downloads about 1 GB)"
	@test "$$($(BIN)/python -c '$(PRINT_VERSION)' 2>/dev/null)" = "$(VERSION)" || { $(CREATE); }
	@$(ENSURE_PIP)
	@$(INSTALL) setuptools wheel
	@$(INSTALL) --no-build-isolation -e .
	@rm -f $(VENV)/.ready-* && touch $@

$(DEV): $(CORE)
	@echo "==> adding the development tools to $(VENV)"
	@$(INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@
