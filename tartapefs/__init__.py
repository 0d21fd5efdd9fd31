"""A folder as one tar archive that needs no disk space: recorded once, read at any offset, checked on every read."""

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, whose import takes a while
if TYPE_CHECKING:
    from tartapefs.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """The public names, imported once one is asked for: the programs take care of signals first."""
        from importlib import import_module

        public = import_module("tartapefs.api")
        if name == "__all__" or name in getattr(public, "__all__", ()):  # which it has once it is imported
            return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
