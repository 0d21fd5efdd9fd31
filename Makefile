# `make demo` and `make test` do all their own set-up on a Debian machine: system packages, virtual environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIR ?= /usr/share/doc

RUN_PACKAGES := python3 python3-venv fuse3 libfuse2
TEST_PACKAGES := $(RUN_PACKAGES) attr bindfs bsdextrautils busybox cpio curl e2fsprogs libarchive-tools mount \
	p7zip-full procps rclone rsync strace tar util-linux btrfs-progs xfsprogs

.PHONY: help demo test lint check bench clean

help:
	@echo "make demo [DIR=folder]   record and mount a folder, read it back with GNU tar, compare"
	@echo "make test                all tests"
	@echo "make lint                format, lint, types, layers"
	@echo "make check               lint and test"
	@echo "make bench               speed against tar, in one run"

# $(call install,packages): installs those of the Debian packages that are missing.
define install
@missing=$$(for package in $(1); do \
	dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || echo $$package; done); \
if [ -n "$$missing" ]; then \
	sudo=$$([ $$(id -u) = 0 ] || echo sudo); \
	$$sudo apt-get update -q && \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
fi
endef

$(VENV)/%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.$(EXTRA)'
	@touch $@

$(VENV)/for-demo: EXTRA :=
$(VENV)/for-test: EXTRA := [lint,test]

demo:
	$(call install,$(RUN_PACKAGES))
	@$(MAKE) -s $(VENV)/for-demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh tests/demo.sh "$(DIR)"

test:
	$(call install,$(TEST_PACKAGES))
	@$(MAKE) -s $(VENV)/for-test
	$(BIN)/python -m pytest

lint:
	$(call install,python3 python3-venv)
	@$(MAKE) -s $(VENV)/for-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

bench:
	$(call install,$(RUN_PACKAGES))
	@$(MAKE) -s $(VENV)/for-demo
	$(BIN)/python tests/bench/bench.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
