"""What the package exports, and that `help` tells of it."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import get_args

import pytest

import tartapefs
from tartapefs.api.archive_file import Parts
from tartapefs.index.schema import TapeFacts
from tartapefs.play.engine import Scrubbed
from tartapefs.play.events import EndMetadata, StartMetadata

EXPORTED = [getattr(tartapefs, name) for name in tartapefs.__all__]
CLASSES = [cls for found in EXPORTED for cls in get_args(found) or [found] if isinstance(cls, type)]
CLASSES += [StartMetadata, EndMetadata, Scrubbed, Parts, TapeFacts]  # to be had from these


def is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "tartapefs"


def attributes(cls: type) -> Iterator[str]:
    """The public attributes and properties of a class and of its bases: of the class, and set on `self`."""
    for base in filter(is_ours, cls.__mro__):
        yield from base.__annotations__ if "__annotations__" in vars(base) else ()
        yield from (name for name, value in vars(base).items() if not callable(getattr(value, "__func__", value)))
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    yield name


@pytest.mark.parametrize("cls", dict.fromkeys(CLASSES), ids=lambda cls: cls.__name__)
def test_help_names_every_attribute(cls: type) -> None:
    """In the docstring of the class or of its bases: in a line `name: meaning`, or `name, another: meaning`, or in
    backquotes."""
    assert cls.__doc__
    text = "\n".join(inspect.cleandoc(base.__doc__ or "") for base in filter(is_ours, cls.__mro__))
    listed = ", ".join(re.findall(r"^(\w+(?:, \w+)*): ", text, re.MULTILINE)).split(", ")
    named = {*listed, *re.findall(r"`(\w+)`", text)}
    assert {name for name in attributes(cls) if not name.startswith("_")} <= named


def test_attributes_are_found() -> None:
    """The check on this test: fields, properties, class variables, and what `__init__` sets."""
    assert {"member", "differences", "remedy"} <= set(attributes(tartapefs.TapeIntegrityError))
    assert {"name", "start", "stop", "size"} <= set(attributes(tartapefs.Window))
    assert {"data", "entry", "metadata", "type"} <= set(attributes(tartapefs.FileEnd))
    assert {"is_file", "mtime_ns"} <= set(attributes(tartapefs.Member))
    assert "read" not in set(attributes(tartapefs.Window))
