"""The command `mlg`: a table of subcommands, each imported only when it is used."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import click

from provider_image.errors import ConfigError, MlgError

#: Name -> ("module:attribute", line in the list of commands).
COMMANDS = {
    "up": ("cli.up:up", "Run the server, the batcher and its workers on this machine."),
    "serve": ("cli.serve:serve", "Run the HTTP server."),
    "batch": ("cli.batch:batch", "Run the batcher, which processes queued requests."),
    "submit": ("cli.submission.submit:submit", "Send images to a server and collect the results."),
    "train": ("cli.training.train:train", "Train your own classifier on a server."),
    "evaluate": ("cli.training.evaluate:evaluate", "Ask a model on examples whose answers are known."),
    "trainings": ("cli.training.trainings:trainings", "List, show or cancel trainings."),
    "telegram": ("cli.clients.telegram:telegram", "Run a Telegram bot that sends photos to a server."),
    "requests": ("cli.requests:requests", "List, show, retry or cancel requests."),
    "collections": ("cli.collections:collections", "Find similar images, near-duplicates and groups."),
    "pipelines": ("cli.pipelines.pipelines:pipelines", "List, check or draw pipelines of models."),
    "models": ("cli.models:models", "List, install or check models."),
    "image": ("cli.image:image", "Build and publish the provider image."),
    "bills": ("cli.rentals.bills:bills", "Show what is not billed or was refused, or write it off."),
    "costs": ("cli.rentals.costs:costs", "Show the cost of rented computers."),
    "providers": ("cli.rentals.providers:providers", "List, ban or unban providers."),
    "golem": ("cli.rentals.golem:golem", "Check the connection to the Golem network."),
    "keys": ("cli.keys:keys", "Create, list or revoke API keys."),
    "load": ("cli.load.load:load", "Measure how a server of your own answers under load."),
    "usage": ("cli.clients.usage:usage", "Show what API keys have sent, how it ended and what it cost."),
    "webhooks": ("cli.webhooks:webhooks", "Notify other programs when a request or a batch is done."),
    "operate": ("cli.operate:operate", "Pause, resume or drain the batchers, or show their status."),
    "devnet": ("cli.rentals.devnet:devnet", "Run a simulated Golem network on this machine."),
    "migrate": ("cli.serve:migrate", "Update the database to the schema of this version."),
}


class LazyGroup(click.Group):
    """The group of all commands, which imports a command only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; the error for an unknown one suggests the most similar name."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else " See: mlg --help"
            ctx.fail(f"There is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlg", message="mlg %(version)s", help="Show the version.")
def cli() -> None:
    """Classify images in batches, on this machine or on rented computers.

    \b
    Example:
      mlg up
      mlg submit --model efficientnet_lite0 --wait photos/
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit: 0 on success, 1 on failure, 2 for wrong settings or usage, 130 on Ctrl-C."""
    try:
        # With standalone_mode=False click raises its errors, so that every error is one line.
        status = cli.main(args=arguments, prog_name="mlg", standalone_mode=False)
    except MlgError as error:
        _show_traceback()
        # It may quote a file or a provider, whose control characters the terminal would obey.
        reason = "".join(each if each.isprintable() or each == "\n" else " " for each in error.reason)
        click.echo(f"mlg: {reason}", err=True)
        status = 2 if isinstance(error, ConfigError) else 1
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _show_traceback()
        status = 130
    except BrokenPipeError:
        # The reader of stdout has exited, as in `mlg requests list | head`. Without this Python would report a second
        # error when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status if isinstance(status, int) else 0)


def _show_traceback() -> None:
    if os.environ.get("MLG_DEBUG") == "1":
        traceback.print_exc()


if __name__ == "__main__":
    main()
