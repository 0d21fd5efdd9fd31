#!/bin/sh
# Runs `make demo`, and tests of mounting, on other releases of Debian, each in a new root folder: with fuse3 alone, so
# that `make demo` installs all that is needed, and then with libfuse 2 beside it. Nothing of it stays.
#
#     tests/system/debians.sh SUITE...      (as root; needs debootstrap)
set -eu

mirror=$(sed -nE 's/^(URIs: *|deb (\[[^]]*\] )?)(https?:[^ ]*\/debian)\/?( .*)?$/\3/p' /etc/apt/sources.list /etc/apt/sources.list.d/* \
    2>/dev/null | head -n 1)
mirror=${mirror:-https://deb.debian.org/debian}

in_root() { # ROOT COMMAND, in a mount and process namespace that end with it
    unshare --mount --pid --fork --kill-child --propagation private sh -euc '
        root=$1
        mount --bind "$root" "$root"
        mount --rbind /dev "$root/dev"
        mount -t proc proc "$root/proc"
        mount --rbind /sys "$root/sys"
        for folder in tmp run; do mount -t tmpfs tmpfs "$root/$folder"; done
        cd "$root"
        pivot_root . mnt  # not chroot alone: tests enter mount namespaces, whose root this is
        exec chroot . env -u TMPDIR -u VIRTUAL_ENV HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive sh -euxc "umount --lazy /mnt; $2"
    ' sh "$1" "$2"
}

with_settings_of_this_machine() { # ROOT: how it reaches the network
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /root/.config/pip/pip.conf /root/.pip/pip.conf \
        /etc/ssl/certs/ca-certificates.crt $(grep -ls Acquire /etc/apt/apt.conf /etc/apt/apt.conf.d/* || true); do
        if [ -e "$file" ]; then mkdir -p "$1${file%/*}" && cp -L "$file" "$1$file"; fi
    done
}

try() { # SUITE ROOT
    debootstrap --variant=minbase --include=ca-certificates,make,python3,python3-venv "$1" "$2" "$mirror" > "$2.log" ||
        { tail "$2.log"; return 1; }
    with_settings_of_this_machine "$2"
    mkdir "$2/project"
    tar -C "$(dirname "$0")/../.." -c --exclude='./.git' --exclude='./.venv*' --exclude='./dist' --exclude='./build' . |
        tar -C "$2/project" -x --no-same-owner
    ln -sf ../proc/self/mounts "$2/etc/mtab"  # as an installed system has it, for fusermount
    in_root "$2" '
        cd /project
        make demo
        make demo > /tmp/again 2>&1
        if grep -E "^(Get:|Setting up )" /tmp/again; then exit 1; fi  # nothing is installed twice
        .venv/bin/tartapefs doctor
        PYTHONWARNINGS=ignore make -s VENV=.venv-test .venv-test/for-pythons
        .venv-test/bin/python -m pytest -q -rs -p no:cacheprovider tests/unit/mount/test_operations.py tests/system/test_mounted.py
        apt-get install -q -y --no-install-recommends libfuse2
        .venv-test/bin/python -m pytest -q -rs -p no:cacheprovider tests/unit/mount/test_libfuse.py tests/system/test_pages.py'
}

work=$(mktemp -d "${TMPDIR:-/tmp}/tartapefs-debians-XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM
failed=
for suite in "$@"; do
    echo "== Debian $suite"
    # Not `try || …`, in which `set -e` has no effect.
    set +e
    (set -e; try "$suite" "$work/$suite")
    code=$?
    set -e
    [ $code = 0 ] || failed="$failed $suite"
    rm -rf --one-file-system "${work:?}/$suite"
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
