# Needs make and a Python from 3.10 to 3.13 with its venv module. All else goes into .venv (and Poetry into .venv-lock).

# The Python that makes the environments; those that exist keep theirs until `make distclean`.
PYTHON ?= python3
# What `make run` hands to etl.py, `make test` to pytest and `make lock` to poetry lock.
ARGS =

POETRY = 2.5.1
POETRY_EXPORT = 1.10.1
POETRY_MIRROR = 0.6.5

# Another environment's settings would mix its packages with ours, or send ours elsewhere.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_PREFIX PIP_TARGET
export PIP_USER = 0

python := .venv/bin/python
lock_stamp := .venv-lock/.poetry-$(POETRY)-export-$(POETRY_EXPORT)-mirror-$(POETRY_MIRROR)
# --use-pep517: PySpark is no wheel, and the pip of Python 3.10 would build it in the old way, which it cannot keep for next time.
pip_install := -m pip install --quiet --disable-pip-version-check --no-input --use-pep517
poetry := POETRY_VIRTUALENVS_CREATE=false .venv-lock/bin/python -m poetry
# Read from poetry.lock alone: a mirror of the index, which POETRY_PYPI_MIRROR_URL sets for `make lock`, leaves no trace.
export_runtime := env -u POETRY_PYPI_MIRROR_URL $(poetry) export --without-urls
export_all := $(export_runtime) --all-groups

.DEFAULT_GOAL := help
PYTHON39 ?= $(shell for python in python3.9 $(HOME)/.pyenv/versions/3.9.*/bin/python3.9; do $$python -c 0 2>/dev/null && echo $$python && break; done)

.PHONY: help setup run test sweep test-spark35 lint format lock lock-check clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile
	@echo 'Options: ARGS="..." for run, test and lock; PYTHON=python3.12 to set up with another Python.'

setup: .venv/.dev ## Set up .venv for all of these (run and test do it themselves)

run: .venv/.runtime ## Run the job; make run ARGS="--help" tells its options
	@$(python) etl.py $(ARGS)

test: .venv/.dev ## Run the tests; make test ARGS="-k users -x" picks and stops
	@$(python) -m pytest $(ARGS)

sweep: .venv/.dev ## Run the long tests: a kill at every step, many random lakes (half an hour)
	@SWEEP=full LAKES=50 $(python) -m pytest tests/test_publish.py tests/test_lakes.py $(ARGS)

test-spark35: .venv/.dev ## Test on PySpark 3.5 and Python 3.9, as on EMR 7, where a python3.9 is found (320 MB to download)
	@if [ -z "$(PYTHON39)" ]; then echo 'Not tested on PySpark 3.5: no python3.9 was found; name one: make test-spark35 PYTHON39=...'; \
	else $(MAKE) --no-print-directory .venv-spark35/.done && $(python) -m pytest tests/test_spark35.py $(ARGS); fi

lint: .venv/.dev ## Check style and types, change nothing
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: .venv/.dev ## Mend style where a tool can
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

lock: $(lock_stamp) ## Write poetry.lock and requirements*.txt from pyproject.toml; ARGS=--regenerate takes newer versions
	@$(poetry) lock $(ARGS)
	@$(export_runtime) --output requirements.txt
	@$(export_all) --output requirements-dev.txt

lock-check: $(lock_stamp) ## Check that poetry.lock and requirements*.txt fit pyproject.toml
	@$(poetry) check --lock --strict || { echo 'poetry.lock is out of step: run "make lock".' >&2; exit 1; }
	@$(export_runtime) | cmp - requirements.txt || { echo 'requirements.txt is out of step: run "make lock".' >&2; exit 1; }
	@$(export_all) | cmp - requirements-dev.txt || { echo 'requirements-dev.txt is out of step: run "make lock".' >&2; exit 1; }

clean: ## Delete tables and caches
	rm -rf output artifacts spark-warehouse metastore_db derby.log .mypy_cache .pytest_cache .ruff_cache
	@find . -name '.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Delete the environments, too
	rm -rf .venv .venv-lock .venv-spark35

# A .venv whose Python has gone or moved since is made again.
ifneq ($(shell { .venv/bin/python -I -S -c 'print(1)'; } 2>/dev/null),1)
.PHONY: .venv/.runtime
endif

define check_python
@version=$$("$(PYTHON)" -c 'import platform; print(platform.python_version())' 2>/dev/null) || version='not there'; \
case "$$version" in \
3.10.*|3.11.*|3.12.*|3.13.*) ;; \
*) echo "This needs Python 3.10 to 3.13, but $(PYTHON) is $$version. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1;; \
esac; \
"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
echo "$(PYTHON) ($$version) lacks its venv module. Install it (Debian, Ubuntu: apt install python3-venv) or name another Python: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
endef

# Each stamp is written last, and the later set-up takes the earlier one's away while it works:
# what was interrupted has no stamp and starts over with an empty .venv.
.venv/.runtime: requirements.txt
	$(check_python)
	@echo 'Setting up .venv: about 620 MB to download the first time, most of it PySpark. This takes a minute on a fast line.'
	@"$(PYTHON)" -m venv --clear .venv
	@$(python) $(pip_install) --require-hashes -r requirements.txt
	@touch $@

.venv/.dev: .venv/.runtime requirements-dev.txt
	@echo 'Adding the development tools to .venv: about 40 MB to download the first time.'
	@rm .venv/.runtime
	@$(python) $(pip_install) --require-hashes -r requirements-dev.txt
	@touch .venv/.runtime $@

.venv-spark35/.done: tests/requirements-spark35.txt
	@echo 'Setting up .venv-spark35: PySpark 3.5, about 320 MB to download the first time.'
	@"$(PYTHON39)" -m venv --clear .venv-spark35
	@.venv-spark35/bin/python $(pip_install) -r tests/requirements-spark35.txt
	@touch $@

$(lock_stamp):
	$(check_python)
	@echo 'Setting up .venv-lock: Poetry, about 20 MB to download the first time.'
	@"$(PYTHON)" -m venv --clear .venv-lock
	@.venv-lock/bin/python $(pip_install) poetry==$(POETRY) poetry-plugin-export==$(POETRY_EXPORT) poetry-plugin-pypi-mirror==$(POETRY_MIRROR)
	@touch $@
