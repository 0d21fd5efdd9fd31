"""The layers: who may import what, who may call what. Two ways: by import-linter, and by reading the code."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tartapefs

PACKAGE = Path(tartapefs.__file__).parent
PROJECT = Path(__file__).parents[1]


def parsed(place: Path) -> ast.Module:
    """The code of a module; of a package, that of all its modules as one, since it is one layer."""
    files = sorted(place.glob("*.py")) if place.is_dir() else [place]
    return ast.Module([line for file in files for line in ast.parse(file.read_bytes(), str(file)).body], [])


MODULES = {
    place.stem: parsed(place) for place in sorted(PACKAGE.iterdir()) if place.suffix == ".py" or any(place.glob("*.py"))
}
LINTER = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]


def test_contracts_of_import_linter() -> None:
    """The contracts in pyproject.toml are kept."""
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed: pip install tartapefs[lint]")
    program = Path(sys.executable).with_name("lint-imports")
    command = [program] if program.exists() else ["lint-imports"]
    result = subprocess.run(
        [*command, "--no-cache"],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Contracts: {len(LINTER['contracts'])} kept, 0 broken" in result.stdout


def imports(tree: ast.Module) -> Iterator[str]:
    """The full name of each module that is imported, wherever in the module that is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield node.module
            if node.module == "tartapefs":
                yield from (f"tartapefs.{alias.name}" for alias in node.names if alias.name in MODULES)


def calls(tree: ast.Module) -> set[str]:
    """What is called, as it is written: `print`, `os.open`, `self.read`."""
    return {named(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def named(call: ast.Call) -> str:
    return ast.unparse(call.func)


def names_used(tree: ast.Module) -> set[str]:
    """Every name and dotted name in the module, called or handed on."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))}


def test_package_is_what_is_looked_at() -> None:
    """The check on these tests: they see the modules, and find what is there to find."""
    assert {"index", "fs", "cli", "source", "player", "recorder", "errors"} <= set(MODULES)
    assert "sqlite3" in set(imports(MODULES["index"]))
    assert "print" in calls(ast.parse("def f():\n    print(1)"))
    assert set(imports(ast.parse("def f():\n    from tartapefs import index"))) == {"tartapefs", "tartapefs.index"}


@pytest.mark.parametrize(
    ("foreign", "allowed"),
    [
        ("sqlite3", {"index"}),
        ("fuse", {"binding"}),
        ("mfusepy", {"binding"}),
        ("click", {"cli"}),
        ("rich", {"cli"}),
        ("pathspec", {"exclusion"}),
        ("argparse", set()),
        ("fsspec", {"url"}),
        ("distributed", {"distributed"}),
        ("boto3", set()),
    ],
)
def test_only_one_layer_knows(foreign: str, allowed: set[str]) -> None:
    """SQL, FUSE, and the parsing of a command line are each known to one module."""
    knowing = {module for module, tree in MODULES.items() if foreign in {name.split(".")[0] for name in imports(tree)}}
    assert knowing <= allowed
    assert knowing or not allowed


def test_only_the_command_line_prints_and_exits() -> None:
    forbidden = {"print", "input", "sys.exit", "exit", "quit", "sys.stdout", "sys.stderr", "sys.argv", "SystemExit"}
    for module, tree in MODULES.items():
        if module != "cli":
            assert not forbidden & names_used(tree), module


# Modules that open files of their own: the index, copies, what the user names as output, files that keep what was
# reached, what the system tells of mounts, processes and threads, the folder of sockets, which `status` also lists.
OPEN_THEIR_OWN = {
    *("index", "cli", "binding", "mount", "status", "copies", "outputs", "tape_files", "apart", "restore"),
    *("hook", "processes"),
}
MAY_LIST = {
    "apart": {"os.listdir"},
    "mount": {"os.listdir"},
    "processes": {"os.listdir"},
    "status": {"os.listdir", "os.scandir"},
}


def test_only_source_opens_what_lies_in_the_source() -> None:
    """No other module has a call that could open or list a file of the source."""
    opening = {"open", "os.open", "io.open", "os.fdopen", "os.listdir", "os.scandir", "os.walk", "os.fwalk", "pathlib"}
    linking = {"os.readlink", "os.mkfifo", "shutil.copy", "shutil.copyfile"}
    for module, tree in MODULES.items():
        if module != "source" and module not in OPEN_THEIR_OWN:
            assert not (opening | linking) & calls(tree), module
            assert "pathlib" not in set(imports(tree)), module
            mapped = [
                call.args[0] for call in ast.walk(tree) if isinstance(call, ast.Call) if named(call) == "mmap.mmap"
            ]
            assert all(ast.unparse(descriptor) == "-1" for descriptor in mapped), "memory, not a file"
        if module in OPEN_THEIR_OWN:
            listing = {"os.listdir", "os.scandir", "os.walk"} - MAY_LIST.get(module, set())
            assert not (linking | listing) & calls(tree), module


def test_one_module_puts_files_in_place() -> None:
    """No other renames, removes, links or locks files. (`restore` extracts; `status` has sockets; `source` leases.)"""
    changing = {"os.rename", "os.replace", "os.unlink", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod"}
    for module, tree in MODULES.items():
        if module not in ("outputs", "restore", "status"):
            assert not changing & calls(tree), module
        if module not in ("outputs", "source"):
            assert "fcntl.flock" not in calls(tree), module
        modes = {ast.unparse(call.args[1]) for call in ast.walk(tree) if isinstance(call, ast.Call)
                 if named(call) == "open" and len(call.args) > 1}  # fmt: skip
        assert modes <= {"'rb'"} or module in ("binding", "mount"), module


def test_pure_modules_do_no_io() -> None:
    """The arithmetic, packs, headers, members, events and errors know of no file system."""
    pure = {
        *("layout", "merkle", "packs", "ustar", "member", "events", "errors"),
        *("display", "activity", "units", "hashstate"),
    }
    for module in pure:
        assert not {name for name in calls(MODULES[module]) if name.startswith("os.") and name not in PURE}, module
        assert "open" not in calls(MODULES[module])


PURE = {"os.fsdecode", "os.fsencode", "os.fspath"}


def levels() -> dict[str, int]:
    """Each module's level, from the contract in pyproject.toml: 0 is the top."""
    layers = next(contract["layers"] for contract in LINTER["contracts"] if contract["type"] == "layers")
    return {module.strip(): level for level, layer in enumerate(layers) for module in layer.split("|")}


# `tape.open()` and `tape.parts()` are asked of the tape and made above it; see docs/decisions/0007-tape-open.md.
UPWARDS = {("tape", "player"), ("tape", "window")}


def test_imports_go_downwards_only() -> None:
    """Every module is in a layer, and imports from lower ones alone."""
    level_of = levels()
    assert set(MODULES) - {"__init__", "__main__"} == set(level_of)
    for module, tree in MODULES.items():
        if module in level_of:
            for name in imports(tree):
                package, imported, *_ = [*name.split("."), ""]
                if package == "tartapefs" and imported not in ("", module) and (module, imported) not in UPWARDS:
                    assert level_of[imported] > level_of[module], f"{module} imports {imported}"


def test_layers_are_those_of_the_design() -> None:
    """Whoever rearranges the contract keeps the order that matters."""
    level_of = levels()
    ways_down = (
        ("cli", "mount", "binding", "fs", "player", "index", "ustar", "errors"),
        ("cli", "recorder", "scan", "source", "errors"),
        ("player", "source"),
        ("audit", "index", "layout", "errors"),
        ("events", "errors"),
    )
    for way in ways_down:
        assert sorted(way, key=level_of.__getitem__) == list(way)
