"""The programs, `tartapefs` and `mount.tartapefs`, and `python -m tartapefs`.

Rule: handle signals before any other import, since imports take a third of a second, in which a user may press
Ctrl-C.
"""

from tartapefs.base.signals import end_at_once


def main() -> None:
    """The program `tartapefs`."""
    end_at_once()
    from tartapefs import cli

    cli.main()


def mount_tartapefs() -> None:
    """The program `mount.tartapefs`, which mount(8) runs."""
    end_at_once()
    from tartapefs import cli

    cli.mount_tartapefs()


if __name__ == "__main__":
    main()
