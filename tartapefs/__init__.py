"""A folder as one tar archive that needs no disk space: recorded once, read at any offset, checked on every read."""

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, whose import takes a while
if TYPE_CHECKING:
    from tartapefs.api.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Imports the public names on first use, since the programs must handle signals before that."""
        if name[0].isupper() or name == "__all__":  # a class, not a module that is about to be imported
            from importlib import import_module

            public = import_module("tartapefs.api.public")
            if name == "__all__" or name in public.__all__:
                return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
