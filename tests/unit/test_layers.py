"""The layers: who may import what, who may call what. Two ways: by import-linter, and by reading the code."""

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tartapefs
from tartapefs.cli import COMMANDS

PACKAGE = Path(tartapefs.__file__).parent
PROJECT = Path(__file__).parents[2]


def module_of(place: Path) -> str:
    """The name of a module below the package: `play.engine`; of a package that of its folder."""
    parts = place.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {module_of(place): ast.parse(place.read_bytes(), str(place)) for place in sorted(PACKAGE.rglob("*.py"))}


LONGEST = 400  # lines
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
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("tartapefs.") in modules() else node.module


def ours(tree: ast.Module) -> set[str]:
    """The modules of the package that are imported, by their names below it."""
    return {name.removeprefix("tartapefs.") for name in imports(tree) if name.startswith("tartapefs.")}


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
    known = {"index.connections", "mount.operations", "cli", "source.folder", "play.engine", "base.errors"}
    assert known <= set(modules())
    assert "sqlite3" in set(imports(modules()["index.connections"]))
    assert "print" in calls(ast.parse("def f():\n    print(1)"))
    assert ours(ast.parse("def f():\n    from tartapefs.index import reader")) == {"index.reader"}
    assert ours(ast.parse("from tartapefs.api import Tape")) == {"api"}


@cache
def imported() -> dict[str, set[str]]:
    """Of each module, the packages that it imports."""
    return {module: {name.split(".")[0] for name in imports(tree)} for module, tree in modules().items()}


@pytest.mark.parametrize(
    ("foreign", "allowed"),
    [
        ("sqlite3", {"index.connections", "index.writer"}),
        ("fuse", {"mount.libfuse"}),
        ("mfusepy", {"mount.libfuse"}),
        ("click", {"cli"}),
        ("pathspec", {"source.exclusion"}),
        ("argparse", set()),
        ("fsspec", {"transfer.url"}),
        ("distributed", {"transfer.distributed", "transfer.workers"}),
        ("boto3", set()),
        ("webdataset", {"webdataset"}),
    ],
)
def test_only_one_layer_knows(foreign: str, allowed: set[str]) -> None:
    """SQL, FUSE, and the parsing of a command line are each known to one module."""
    knowing = {module for module, names in imported().items() if foreign in names}
    if allowed == {"cli"}:
        knowing = {module.partition(".")[0] for module in knowing}
    assert knowing <= allowed
    assert knowing or not allowed


def test_only_the_command_line_prints_and_exits() -> None:
    forbidden = {"print", "input", "sys.exit", "exit", "quit", "sys.stdout", "sys.stderr", "sys.argv", "SystemExit"}
    for module, tree in modules().items():
        if module.partition(".")[0] != "cli":
            assert not forbidden & names_used(tree), module


# Modules that open files of their own: the index, copies, what the user names as output, files that keep what was
# reached, what the system tells of mounts, processes and threads, the folder of sockets, which `status` also lists.
OPEN_THEIR_OWN = {
    *(
        "index.connections",
        "mount.daemon",
        "mount.hook",
        "mount.libfuse",
        "mount.machine_checks",
        "mount.mount_table",
        "mount.read_ahead",
        "mount.status",
        "transfer.copies",
        "verify.destination",
        "verify.ranged_requests",
    ),
    *("base.forked_work", "base.mountinfo", "base.outputs", "base.processes"),
    *("base.saved_state", "base.tape_files"),
    *(module for module in modules() if module.partition(".")[0] == "cli"),
}
OPEN_THE_SOURCE = {"source.folder", "source.system_calls"}
MAY_LIST = {
    "base.forked_work": {"os.listdir"},
    "mount.mount_table": {"os.listdir"},
    "base.processes": {"os.listdir"},
    "mount.status": {"os.listdir", "os.scandir"},
    "verify.destination": {"os.readlink"},
    "cli.record": {"shutil.copyfile"},  # an index
}


def test_only_source_opens_what_lies_in_the_source() -> None:
    """No other module has a call that could open or list a file of the source."""
    opening = {"open", "os.open", "io.open", "os.fdopen", "os.listdir", "os.scandir", "os.walk", "os.fwalk", "pathlib"}
    linking = {"os.readlink", "os.mkfifo", "shutil.copy", "shutil.copyfile"}
    for module, tree in modules().items():
        if module not in OPEN_THE_SOURCE | OPEN_THEIR_OWN:
            assert not (opening | linking) & calls(tree), module
            assert "pathlib" not in set(imports(tree)), module
            mapped = [
                call.args[0] for call in ast.walk(tree) if isinstance(call, ast.Call) if named(call) == "mmap.mmap"
            ]
            assert all(ast.unparse(descriptor) == "-1" for descriptor in mapped), "memory, not a file"
        if module in OPEN_THEIR_OWN:
            listing = {"os.listdir", "os.scandir", "os.walk"}
            assert not ((linking | listing) - MAY_LIST.get(module, set())) & calls(tree), module


def test_few_modules_put_files_in_place() -> None:
    """No others rename, remove, link or lock files. (`destination` restores; `status` has sockets; `source` a lock.)"""
    changing = {"os.rename", "os.replace", "os.unlink", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod"}
    for module, tree in modules().items():
        if module not in ("base.outputs", "base.saved_state", "verify.destination", "mount.status"):
            assert not changing & calls(tree), module
        if module not in ("base.outputs", "source.folder"):
            assert "fcntl.flock" not in calls(tree), module
        modes = {ast.unparse(call.args[1]) for call in ast.walk(tree) if isinstance(call, ast.Call)
                 if named(call) == "open" and len(call.args) > 1}  # fmt: skip
        assert modes <= {"'rb'"} or module in ("base.outputs", "mount.libfuse", "mount.read_ahead"), module


def test_pure_modules_do_no_io() -> None:
    """The arithmetic, packs, headers, members, events and errors know of no file system."""
    pure = {
        *("archive.layout", "archive.hash_tree", "archive.ustar", "archive.member", "index.row_codec", "index.schema"),
        *("play.events", "base.errors", "base.text", "base.resumable_hash", "mount.read_statistics", "mount.units"),
    }
    for module in pure:
        assert not {name for name in calls(modules()[module]) if name.startswith("os.") and name not in PURE}, module
        assert "open" not in calls(modules()[module])


PURE = {"os.fsdecode", "os.fsencode", "os.fspath"}


def levels() -> dict[str, int]:
    """Each folder's level, from the contract in pyproject.toml: 0 is the top."""
    layers = next(contract["layers"] for contract in LINTER["contracts"] if contract["type"] == "layers")
    return {folder.strip(): level for level, layer in enumerate(layers) for folder in layer.split("|")}


def test_imports_go_downwards_only() -> None:
    """Every folder is in a layer, and imports from lower ones alone. At the top lies what users and the system run."""
    level_of = levels()
    tops = {module.partition(".")[0] for module in modules()} - {"", "__main__"}
    assert tops == set(level_of)
    assert {place.name for place in PACKAGE.glob("*.py")} == {
        *("__init__.py", "__main__.py"),
        *("distributed.py", "webdataset.py"),
    }
    for module, tree in modules().items():
        top = module.partition(".")[0]
        if top in level_of:
            for imported in {name.partition(".")[0] for name in ours(tree)} - {top}:
                assert level_of[imported] > level_of[top], f"{module} imports {imported}"


def test_no_modules_import_each_other() -> None:
    """Imports within functions, and for types, are counted, too, and those of the table of commands."""
    graph = {module: ours(tree) & set(modules()) - {module} for module, tree in modules().items() if module}
    graph["cli"] |= {f"cli.{module}" for module, _ in COMMANDS.values()}
    assert graph["cli"] <= set(modules())
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph | {"base.errors": {"cli"}}).prepare()


def test_layers_are_those_of_the_design() -> None:
    """Whoever rearranges the contract keeps the order that matters."""
    level_of = levels()
    ways_down = (
        ("cli", "mount", "play", "index", "archive", "base"),
        ("cli", "verify", "api", "record", "source", "archive"),
        ("transfer", "api", "play", "source"),
    )
    for way in ways_down:
        assert sorted(way, key=level_of.__getitem__) == list(way)


def test_no_module_is_long() -> None:
    """A module with more lines does more than one thing."""
    long = {module for module, tree in modules().items() if tree.body and tree.body[-1].end_lineno > LONGEST}
    assert not long


def test_no_test_imports_another() -> None:
    """What tests share lies in tests/support."""
    tests = PROJECT / "tests"
    trees = {place: ast.parse(place.read_bytes()) for place in tests.rglob("*.py")}
    modules = {".".join(place.relative_to(tests).with_suffix("").parts) for place in trees if place.name[:5] == "test_"}
    found = {name for tree in trees.values() for name in imports(tree)}
    found |= {f"{node.module}.{alias.name}" for tree in trees.values() for node in ast.walk(tree)
              if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    assert not found & modules
