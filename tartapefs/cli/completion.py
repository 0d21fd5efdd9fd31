"""The command that prints a shell's completion: completion."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


def script(cli: click.Command, shell: str) -> str:
    """The script with which `shell` asks `tartapefs` for completions."""
    completes = get_completion_class(shell)
    assert completes is not None  # click has these three
    # Not `.source()`, which runs the shell for its version: the shell need not be installed here.
    instance = completes(cli, {}, "tartapefs", "_TARTAPEFS_COMPLETE")
    return instance.source_template % instance.source_vars()


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    It completes commands, options and paths. For bash put this into ~/.bashrc: eval "$(tartapefs completion bash)". For
    zsh the same with zsh, into ~/.zshrc after compinit. For fish: tartapefs completion fish >
    ~/.config/fish/completions/tartapefs.fish
    """
    click.echo(script(context.find_root().command, shell))
