# `make demo` and `make test` do all their own set-up on a Debian machine: system packages, virtual environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIR ?= /usr/share/doc
RUNS ?= 100000
SECONDS ?= 3600

RUN_PACKAGES := python3 python3-venv fuse3 libfuse2
TEST_PACKAGES := $(RUN_PACKAGES) attr bindfs bsdextrautils btrfs-progs busybox cpio curl dbus dbus-user-session \
	e2fsprogs libarchive-tools libpam-systemd mount p7zip-full passwd procps rclone rsync strace systemd tar \
	util-linux xfsprogs

.PHONY: help demo test lint check bench fuzz soak mutants clean

help:
	@echo "make demo [DIR=folder]   record and mount a folder, read it back with GNU tar, compare"
	@echo "make test                all tests"
	@echo "make lint                format, lint, types, layers"
	@echo "make check               lint and test"
	@echo "make bench               speed against tar, in one run"
	@echo "make fuzz [RUNS=100000]  damaged indexes, found by coverage; -1 goes on for ever"
	@echo "make soak [SECONDS=3600] random reads, memory and descriptors watched"
	@echo "make mutants             takes each integrity check out in turn; a test must fail"

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

fuzz:
	@$(MAKE) -s $(VENV)/for-test
	cd tests && ../$(BIN)/python fuzz/fuzz_index.py -runs=$(RUNS) -timeout=20 -rss_limit_mb=512 -artifact_prefix=/tmp/

soak:
	$(call install,$(RUN_PACKAGES))
	@$(MAKE) -s $(VENV)/for-test
	cd tests && ../$(BIN)/python soak.py --seconds $(SECONDS)

mutants:
	$(call install,$(TEST_PACKAGES))
	@$(MAKE) -s $(VENV)/for-test
	$(BIN)/python tests/mutants.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
