"""The commands of tartapefs that messages name, complete: a user can copy one and paste it into a shell.

Rule: a message has a command in double quotes. What knows neither the folder nor the index, as an error that is raised
deep in the library, names it with its options alone: "tartapefs record --force". Whoever knows them, the command line
from its arguments and the daemon, says so once, by `given`, and from then on `command` and `complete` add them. To a
Python program nobody adds anything (docs/decisions/0035).
"""

import re

from tartapefs.base.text import printable

_BARE = re.compile('"tartapefs ((?:record|seal)(?: --[a-z-]+)*)"')

_given: tuple[str, ...] = ()


def given(directory: str, index: str | None) -> None:
    """Has all commands from now on name this folder and, unless it is None, this index."""
    global _given
    _given = of_tape(directory, index)


def of_tape(directory: str, index: str | None) -> tuple[str, ...]:
    """The arguments of a command for the tape of this folder."""
    return (as_path(directory), *(("--index", index) if index else ()))


def command(begin: str, *arguments: str) -> str:
    """The command of tartapefs that begins with these words: its name and options; then come folder and index.

    >>> command("resume", "it's a copy.tar")
    'tartapefs resume \\'it\\'"\\'"\\'s a copy.tar\\''
    """
    return " ".join([f"tartapefs {begin}", *map(quoted, (*_given, *arguments))])


def complete(remedy: str) -> str:
    """Adds folder and index to each command in this text that has options alone; to others nothing."""
    return _BARE.sub(lambda found: f'"{command(found[1])}"', remedy)


def as_path(name: str) -> str:
    """A path that no command takes for an option."""
    return f"./{name}" if name.startswith("-") else name


def quoted(word: str) -> str:
    r"""A word as a shell reads it, on one line; if it is not printable, as bash and zsh do, and sh since POSIX 2024.

    >>> print(quoted("my data"), quoted("two\nlines"))
    'my data' $'two\nlines'
    """
    import shlex  # here: most commands have nothing to quote

    return shlex.quote(word) if word.isprintable() else "$'" + printable(word).replace("'", r"\'") + "'"
