"""A command as it was typed, with one option changed: what a person is told to run next."""

from __future__ import annotations

import shlex

import typer


def again(context: typer.Context, **changes: str) -> str:
    """The command of `context` with the options that were typed, and `changes` in place of theirs."""
    words = context.command_path.split()
    for parameter in context.command.params:
        name, source = str(parameter.name), context.get_parameter_source(str(parameter.name))
        value = changes.get(name, context.params.get(name))
        if name not in changes and (source is None or source.name != "COMMANDLINE"):
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, bool):
                words.append(parameter.opts[0] if one else (parameter.secondary_opts or parameter.opts)[0])
            else:
                words += [parameter.opts[0], str(one)]
    return shlex.join(words)
