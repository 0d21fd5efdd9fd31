#!/bin/sh
# Records a folder, mounts its archive, reads it back with GNU tar, and compares. The folder itself is not written to:
# the index goes to a temporary place.
set -eu

source=$(realpath "${1:-/usr/share/doc}")
name=$(basename "$source")
work=$(mktemp -d "${TMPDIR:-/tmp}/tartapefs-demo-XXXXXX")

clean_up() {
    if mountpoint -q "$work/mnt"; then tartapefs unmount "$work/mnt"; fi
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }
# Everything but owners, which an archive scrubs: type, mode, time of change to the second, link target, path.
facts() { (cd "$1" && find . -path ./.tartape -prune -o ! -type s ! -type p -printf '%y %m %TY-%Tm-%Td %TH:%TM %.2TS %l %p\n' | sort); }

mkdir "$work/mnt" "$work/back"

say "record $source"
tartapefs record "$source" --index "$work/index.db"
tartapefs info "$source" --index "$work/index.db"

say "mount it: the archive takes no space and has a known size"
tartapefs mount "$source" "$work/mnt" --index "$work/index.db"
ls -l "$work/mnt"

say "GNU tar reads it back"
tar -xpf "$work/mnt/archive.tar" -C "$work/back"
diff -r --no-dereference --exclude=.tartape "$source" "$work/back/$name"
facts "$source" > "$work/recorded"
facts "$work/back/$name" > "$work/found"
diff "$work/recorded" "$work/found"
echo "equal: $(wc -l < "$work/found") members, contents, modes, times, links"

say "any byte of it, at once: the last 20 KiB"
tail -c 20480 "$work/mnt/archive.tar" | sha256sum
tartapefs play "$source" --index "$work/index.db" | tail -c 20480 | sha256sum

say "unmount"
tartapefs unmount "$work/mnt"
echo "done"
