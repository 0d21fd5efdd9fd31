# `make demo` and `make test` do all their own set-up on a Debian machine: system packages, virtual environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIR ?= /usr/share/doc
RUNS ?= 100000
SECONDS ?= 3600
SUITES ?= bookworm trixie sid
PYTHONS ?= $(foreach minor,11 12 13 14,$(firstword $(wildcard \
	$(HOME)/.pyenv/versions/3.$(minor).*/bin/python /usr/local/bin/python3.$(minor) /usr/bin/python3.$(minor))))
# Each of the thousands of processes that the tests start would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE
# Twice the cores, for tests that wait; a worker that is done takes tests from the others.
WORKERS := -n 4 --dist worksteal
# What the other versions of Python and libfuse 3 could change.
MOUNT_TESTS := tests/unit/mount/test_operations.py $(addprefix tests/system/, \
	test_hold.py test_mount.py test_mount_by_users.py test_mounted.py test_unmount.py)
PYTHON_TESTS := $(MOUNT_TESTS) tests/unit/index tests/unit/play tests/unit/mount/test_libfuse.py

RUN_PACKAGES := python3 python3-venv fuse3
TEST_PACKAGES := $(RUN_PACKAGES) libfuse2 acl attr bindfs bsdextrautils btrfs-progs busybox cpio curl dbus \
	dbus-user-session e2fsprogs fish jq libarchive-tools libpam-systemd mandoc mount openssh-client openssh-server p7zip-full passwd procps \
	rclone rsync strace systemd tar util-linux xfsprogs zsh
BENCH_PACKAGES := $(RUN_PACKAGES) libfuse2 bindfs coreutils findutils mount tar
# File systems and clients that nobody here wrote.
WILD_PACKAGES := $(TEST_PACKAGES) age apache2-bin aria2 debootstrap duplicity exfat-fuse exfatprogs fio gcc gnupg \
	gocryptfs libc6-dev liburing-dev lftp libnfs-utils netcat-openbsd nfs-ganesha nfs-ganesha-vfs nginx-light nodejs perl pv \
	rdiff-backup samba smbclient sshfs udev wget
PODMAN_PACKAGES := $(TEST_PACKAGES) crun podman uidmap

.PHONY: help demo for-test test test-long matrix test-all lint check package man bench fuzz soak mutants pythons podman clients wild debians clean

help:
	@echo "make demo [DIR=folder]   record and mount a folder, read it back with GNU tar, compare"
	@echo "make test                tests of every kind, in four minutes on two cores"
	@echo "make test-long           the other tests: more cases, real trees, installations, crashes; libfuse 3 throughout"
	@echo "make matrix              the largest products, of which test-long runs some cases for all: each change on each file"
	@echo "                         system, each page and program with each failure"
	@echo "make test-all            test, test-long and matrix"
	@echo "make lint                format, lint, types, layers"
	@echo "make check               lint and all tests"
	@echo "make package             wheel and sdist, in dist/"
	@echo "make man                 manual pages and completions, below build/share"
	@echo "make bench [BENCH=rows]  speed against tar, find, bindfs, in one run; with BENCH=--help, what else it can"
	@echo "make fuzz [RUNS=100000]  damaged indexes, found by coverage; -1 goes on for ever"
	@echo "make soak [SECONDS=3600] random reads, memory and descriptors watched"
	@echo "make pythons [PYTHONS=]  the tests that may depend on it, on each Python from 3.11 to 3.14 that is found"
	@echo "make podman              containers by Podman, which it installs"
	@echo "make clients             ratarmount, Ray and s3fs, which are large, in a virtual environment of their own"
	@echo "make wild                file systems, clients and systems that nobody here wrote"
	@echo "make debians [SUITES=]   the demo and tests of mounting on Debian 12, 13 and unstable, each in a new root folder"
	@echo "make mutants             takes each integrity check out in turn; a test must fail"

# $(call install,packages): installs those of the Debian packages that are missing.
define install
@installed=$$(dpkg-query -W -f '$${db:Status-Status} $${Package}, $${Provides},\n' | grep '^installed '); \
missing=$$(for package in $(1); do echo "$$installed" | grep -q " $$package[ ,]" || echo $$package; done); \
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
$(VENV)/for-wild: EXTRA := [lint,test,wild]
$(VENV)/for-bench: EXTRA := [blake3]
$(VENV)/for-pythons: EXTRA := [test-basic]

demo:
	$(call install,$(RUN_PACKAGES))
	@$(MAKE) -s $(VENV)/for-demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh tests/system/demo.sh "$(DIR)"

for-test:
	$(call install,$(TEST_PACKAGES))
	@$(MAKE) -s $(VENV)/for-test

test: for-test
	$(BIN)/python -m pytest $(WORKERS) -m 'not long and not matrix and not podman and not wild'

test-long: for-test
	$(BIN)/python -m pytest $(WORKERS) -m 'long and not matrix and not podman and not wild'
	TARTAPEFS_BINDING=mfusepy $(BIN)/python -m pytest $(WORKERS) $(MOUNT_TESTS)

matrix: for-test
	$(BIN)/python -m pytest $(WORKERS) -m 'matrix and not podman and not wild'

test-all: test test-long matrix

lint:
	$(call install,python3 python3-venv)
	@$(MAKE) -s $(VENV)/for-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test-all

package:
	@$(MAKE) -s $(VENV)/for-test
	$(BIN)/python -m build

man:
	@$(MAKE) -s $(VENV)/for-test
	$(BIN)/python packaging/pages.py build

bench:
	$(call install,$(BENCH_PACKAGES))
	@$(MAKE) -s $(VENV)/for-bench
	$(BIN)/python tests/bench/bench.py $(BENCH)

fuzz:
	@$(MAKE) -s $(VENV)/for-test
	cd tests && ../$(BIN)/python long/fuzz_index.py -runs=$(RUNS) -timeout=20 -rss_limit_mb=512 -artifact_prefix=/tmp/

soak:
	$(call install,$(RUN_PACKAGES))
	@$(MAKE) -s $(VENV)/for-test
	cd tests && ../$(BIN)/python -m long.soak --seconds $(SECONDS)

mutants:
	$(call install,$(TEST_PACKAGES))
	@$(MAKE) -s $(VENV)/for-test
	$(BIN)/python tests/long/mutants.py

pythons:
	$(call install,$(TEST_PACKAGES))
	@test -n "$(PYTHONS)" || { echo "no Python found: make pythons PYTHONS='python3.11 python3.14'"; exit 1; }
	@failed=; for python in $(PYTHONS); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && $$python --version && \
		$(MAKE) -s PYTHON=$$python VENV=$(VENV)-$$version $(VENV)-$$version/for-pythons && \
		$(VENV)-$$version/bin/python -m pytest -q $(WORKERS) $(PYTHON_TESTS) || failed="$$failed $$python"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

podman:
	$(call install,$(PODMAN_PACKAGES))
	@$(MAKE) -s $(VENV)/for-test
	$(BIN)/python -m pytest -m podman tests/system/test_podman.py

clients:
	@test -x $(VENV)-clients/bin/python || $(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/pip install -q --disable-pip-version-check -e '.[distributed,test-basic]' 'ray[data]' s3fs \
		'moto[server] >= 5' 'ratarmount >= 1.3' aiohttp
	$(VENV)-clients/bin/python -m pytest -q tests/system/test_ratarmount.py tests/system/test_ray.py \
		tests/system/test_s3fs.py

wild:
	$(call install,$(WILD_PACKAGES))
	@$(MAKE) -s $(VENV)/for-wild
	$(BIN)/python -m pytest $(WORKERS) -m wild

debians:
	$(call install,debootstrap util-linux)
	sh tests/system/debians.sh $(SUITES)

clean:
	rm -rf $(VENV) $(VENV)-* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
