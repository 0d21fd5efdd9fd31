"""The wheel and the sdist: installed into a fresh environment, with nothing of the source tree in reach, they work."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from support.programs import TARTAPEFS

import tartapefs
from tartapefs.cli import cli

PROJECT = Path(__file__).parents[2]
SHARED = {
    "share/man/man1/tartapefs.1",
    "share/man/man8/mount.tartapefs.8",
    "share/bash-completion/completions/tartapefs",
    "share/zsh/site-functions/_tartapefs",
    "share/fish/vendor_completions.d/tartapefs.fish",
}
COMMANDS = tuple(cli.commands)


def run(*command: object, **options: object) -> str:
    """What it prints; it has to succeed."""
    text = {"text": True, "capture_output": True, "timeout": 240, "stdin": subprocess.DEVNULL}
    result = subprocess.run(list(map(os.fspath, command)), **(text | options))  # type: ignore[arg-type]
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return str(result.stdout)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and with the wheel, which is made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    # What a build needs is here already; isolated, it would be fetched twice.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, PROJECT, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def unpacked(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (project,) = folder.iterdir()
    return project


@pytest.fixture(scope="session")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin/pip", "install", "-q", "--disable-pip-version-check", *built.glob("*.whl"))
    return folder


def alone(environment: Path) -> dict[str, str]:
    """Without anything that leads to the source tree, or to the environment that the tests run in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {"PATH": f"{environment / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin"}


@pytest.mark.fuse
def test_the_demo_with_the_installed_wheel(installed: Path, tree: Path, tmp_path: Path) -> None:
    environment = alone(installed)
    code = "import tartapefs; print(tartapefs.__file__)"
    assert run("python", "-c", code, env=environment, cwd=tmp_path).startswith(str(installed))
    assert run("tartapefs", "--version", env=environment) == f"tartapefs, version {tartapefs.__version__}\n"
    said = run("sh", PROJECT / "tests" / "system" / "demo.sh", tree, env=environment, cwd=tmp_path)
    assert "equal: " in said
    assert said.endswith("done\n")


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("command", "what"),
    [("uv tool install --quiet --python", "*.tar.gz"), ("pipx install --quiet --python", "*.whl")],
    ids=["uv", "pipx"],
)
def test_other_ways_to_install(built: Path, tree: Path, tmp_path: Path, command: str, what: str) -> None:
    """Both programs are there, with nothing else on the path, and the manual pages where pipx has such."""
    installer = os.path.join(sysconfig.get_path("scripts"), command.split()[0])
    places = {f"PIPX_{name}": str(tmp_path / name) for name in ("HOME", "BIN_DIR", "MAN_DIR")}
    places |= {"UV_TOOL_DIR": str(tmp_path / "tools"), "UV_TOOL_BIN_DIR": str(tmp_path / "BIN_DIR")}
    if certificates := os.environ.get("PIP_CERT"):
        places["SSL_CERT_FILE"] = certificates
    environment = alone(tmp_path / "none") | places
    run(installer, *command.split()[1:], sys.executable, *built.glob(what), env=environment, cwd=tmp_path)
    environment["PATH"] = f"{tmp_path / 'BIN_DIR'}:{environment['PATH']}"
    assert run("sh", PROJECT / "tests" / "system" / "demo.sh", tree, env=environment, cwd=tmp_path).endswith("done\n")
    assert run("mount.tartapefs", "--help", env=environment).startswith("Usage: mount.tartapefs ")
    if "pipx" in command:
        assert (tmp_path / "MAN_DIR" / "man8" / "mount.tartapefs.8").is_file()


def test_an_interrupt(installed: Path, tree: Path, tmp_path: Path) -> None:
    """Is told, by exit code 130 and a line; and an interrupt that whoever starts it has ruled out is none."""
    environment = alone(installed)
    run("tartapefs", "record", tree, "--index", tmp_path / "index", env=environment)
    command = ["tartapefs", "play", tree, "--index", tmp_path / "index"]
    for is_ruled_out in (False, True):
        before = ["env", "--ignore-signal=INT"] if is_ruled_out else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, "pipesize": 4096}
        with subprocess.Popen([*before, *command], **pipes) as process:  # type: ignore[call-overload]
            assert process.stdout
            process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            said = process.communicate()[1].strip()
            if is_ruled_out:
                assert (process.wait(), said) == (0, b"")
            else:
                assert (process.wait(), said) == (130, b"tartapefs: interrupted")


def test_what_is_installed_beside_the_program(installed: Path) -> None:
    """Pages, completions, and the helper of mount(8)."""
    assert {path for path in SHARED if (installed / path).is_file()} == SHARED
    assert run(installed / "bin" / "mount.tartapefs", "--help").startswith("Usage: mount.tartapefs ")
    assert (installed / "share/bash-completion/completions/tartapefs").read_text().strip() == printed("bash").strip()


@pytest.mark.needs("mandoc")
@pytest.mark.parametrize("page", ["share/man/man1/tartapefs.1", "share/man/man8/mount.tartapefs.8"])
def test_the_manual_pages_say_what_help_says(installed: Path, page: str) -> None:
    """Each line of each --help; and no error of the language that they are written in."""
    found = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", installed / page], capture_output=True, text=True)
    assert [line for line in found.stdout.splitlines() if "missing date" not in line] == []
    shown = run("mandoc", "-T", "utf8", "-O", "width=200", installed / page)
    while "\b" in shown:  # bold, as a printer makes it
        at = shown.index("\b")
        shown = shown[: at - 1] + shown[at + 1 :]
    words = " ".join(shown.split())
    program = Path(page).stem
    commands = [(name,) for name in COMMANDS] if program == "tartapefs" else []
    for command in [(), *commands]:
        wide = alone(installed) | {"COLUMNS": "10000", "TERMINAL_WIDTH": "10000"}
        for line in run(installed / "bin" / program, *command, "--help", env=wide).splitlines():
            if line.startswith("  ") and not line.strip().startswith(COMMANDS):
                for part in line.split("  "):
                    assert " ".join(part.split()) in words, line


def test_the_sdist_is_complete(unpacked: Path) -> None:
    """All that is under version control, but what only version control needs; without a checkout, all tests."""
    if (PROJECT / ".git").exists() and shutil.which("git"):
        names = run("git", "-c", "safe.directory=*", "-C", PROJECT, "ls-files").splitlines()
    else:
        names = [str(path.relative_to(PROJECT)) for path in (PROJECT / "tests").rglob("*.py")]
    missing = [name for name in names if not (unpacked / name).exists() and (PROJECT / name).exists()]
    assert missing == []


def test_the_tests_of_the_sdist_run(unpacked: Path) -> None:
    """On the modules that lie beside them; here a quick one."""
    environment = os.environ | {"PYTHONPATH": str(unpacked), "CI": ""}
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    said = run(*pytest_, "tests/unit/archive/test_layout.py", cwd=unpacked, env=environment)
    assert " passed" in said
    code = "import tartapefs; print(tartapefs.__file__)"
    assert run(sys.executable, "-c", code, cwd=unpacked, env=environment).startswith(str(unpacked))


def test_the_version_is_in_one_place(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == {
        f"tartapefs-{tartapefs.__version__}.tar.gz",
        f"tartapefs-{tartapefs.__version__}-py3-none-any.whl",
    }
    assert f"## {tartapefs.__version__}" in (PROJECT / "CHANGELOG.md").read_text()


# Completion


def printed(shell: str) -> str:
    return run(*TARTAPEFS, "completion", shell)


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment with `tartapefs` on its path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tartapefs").write_text(f'#!/bin/sh\nexec {sys.executable} -m tartapefs "$@"\n')
    (tmp_path / "bin" / "tartapefs").chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}


@pytest.mark.needs("bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sta"], ["status"]),
        (["mount", "--audit-s"], ["--audit-share"]),
        (["verify", "--source-check", "m"], ["mtime"]),
    ],
)
def test_completion_of_bash(program: dict[str, str], words: list[str], found: list[str]) -> None:
    line = f"COMP_WORDS=(tartapefs {' '.join(words)}); COMP_CWORD={len(words)}; _tartapefs_completion tartapefs"
    code = f'{printed("bash")}\n{line}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    assert run("bash", "-c", code, env=program).split() == found


@pytest.mark.needs("fish")
def test_completion_of_fish(program: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(printed("fish"))
    (tmp_path / "some-folder").mkdir()
    code = f"source {tmp_path}/script; complete -C 'tartapefs stat'; complete -C 'tartapefs record some-'"
    found = [line.split("\t")[0] for line in run("fish", "-c", code, env=program, cwd=tmp_path).splitlines()]
    assert found == ["status", "some-folder/"]


@pytest.mark.needs("zsh")
def test_completion_of_zsh(program: dict[str, str], tmp_path: Path) -> None:
    """Its syntax, and what it asks the program, whose answer comes in threes."""
    (tmp_path / "script").write_text(printed("zsh"))
    run("zsh", "-n", tmp_path / "script")
    asked = program | {"COMP_WORDS": "tartapefs stat", "COMP_CWORD": "1", "_TARTAPEFS_COMPLETE": "zsh_complete"}
    assert run("tartapefs", env=asked).splitlines()[:2] == ["plain", "status"]


def test_completion_of_an_unknown_shell() -> None:
    result = subprocess.run([*TARTAPEFS, "completion", "tcsh"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "'bash', 'zsh', 'fish'" in result.stderr
