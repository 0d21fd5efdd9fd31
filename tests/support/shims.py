"""Shims before the programs that a page calls. One call fails half way: prints half of its output, exits with 1."""

from collections.abc import Iterable

from support.cookbook import Kitchen

# Writes its name to a list. Where that is the call that has to fail, it gives half of its output and exits with 1.
SHIM = """#!/bin/bash
PATH=${{PATH#*:}}
echo {name} >> {calls}
number=$(grep -cx {name} {calls})
[ "{name} $number" = "{failing}" ] || exec {name} "$@"
said=$({name} "$@" | base64 -w0)
size=$(base64 -d <<< "$said" | wc -c)
base64 -d <<< "$said" | head -c $((size / 2))
exit 1
"""


def shim(kitchen: Kitchen, programs: Iterable[str], failing: str) -> None:
    """Puts shims in the way of these programs; `failing` is the call that fails, such as "rsync 2", or "" for none."""
    folder = kitchen.folder / "shims"
    folder.mkdir(exist_ok=True)
    (kitchen.folder / "calls").unlink(missing_ok=True)
    for name in programs:
        (folder / name).write_text(SHIM.format(name=name, calls=kitchen.folder / "calls", failing=failing))
        (folder / name).chmod(0o755)
    kitchen.environment["PATH"] = f"{folder}:{kitchen.environment['PATH'].removeprefix(f'{folder}:')}"
