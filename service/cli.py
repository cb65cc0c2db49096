"""The command `moepager`: gathers every room's commands and turns errors into one message and an exit code.

Importing it must stay quick: torch and the rest are imported by the commands that need them, when they run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NoReturn

import typer

from engine.before_torch import prepare_process
from store.errors import Held, MoepagerError, StoreUnreachable

GROUP = "moepager.commands"
REFUSED = 2  # the exit code of everything that a person can put right
AWAY = 75  # EX_TEMPFAIL: the store can't be reached, and the same command may work later
HELD = 69  # EX_UNAVAILABLE: another process is at the same task


def main() -> NoReturn:
    prepare_process()
    try:
        gather(entry_points(group=GROUP))(prog_name="moepager")
    except MoepagerError as error:
        typer.echo(f"moepager: {error}", err=True)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def exit_code(error: MoepagerError) -> int:
    if isinstance(error, StoreUnreachable):
        return AWAY
    return HELD if isinstance(error, Held) else REFUSED


def gather(points: Iterable[EntryPoint]) -> typer.Typer:
    """One application of all rooms' commands. An app with a name becomes a group, one without adds to the top level."""
    root = typer.Typer(
        name="moepager",
        help="Serve a Mixture-of-Experts model with just the experts that a task needs.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    root.callback(no_args_is_help=True)(_before_any)
    for point in sorted(points, key=lambda point: point.name):
        root.add_typer(point.load())
    return root


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415

        typer.echo(version("moepager"))
        raise typer.Exit


def _before_any(
    version: bool = typer.Option(  # noqa: ARG001 - its callback answers, before a command is missed
        False, "--version", callback=_say_version, is_eager=True, help="Print the version and exit."
    ),
    settings: Path | None = typer.Option(  # noqa: B008 - typer's way
        None,
        help="A file of MOEPAGER_* settings. Variables win over it, options over both. Default: MOEPAGER_SETTINGS.",
    ),
) -> None:
    from service.settings import FILE, apply_file, refuse_unknown_variables  # noqa: PLC0415

    refuse_unknown_variables(os.environ)
    file = settings or (Path(os.environ[FILE]) if os.environ.get(FILE) else None)
    if file is not None:
        apply_file(file, os.environ)
