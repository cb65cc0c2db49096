"""`moepager keys`: create, list and revoke the keys of a service. A running service sees the change within a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from service.keys import make_key
from service.settings import load_settings
from store.errors import NotFound

if TYPE_CHECKING:
    from store.database import Store
    from store.records import ApiKey

app = typer.Typer(help="API keys: with the first one, every route but /healthz and /readyz needs a key.")

StoreUrl = Annotated[str | None, typer.Option("--store", help="A database URL. Default: the embedded store.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people.")],
    role: Annotated[
        str, typer.Option(help="query: ask. operator: also tasks, jobs, eviction, prefetch, drain.")
    ] = "query",
    per_minute: Annotated[int | None, typer.Option(help="Requests a minute. Default: no limit.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable: for this key there are no other tasks. Default: all, later ones too."),
    ] = None,
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Make a key and show it, once: the store keeps only its hash."""
    key, secret = make_key(name, role, per_minute, task or ())
    with _opened(store) as opened:
        _refuse_unknown(task or (), opened)
        opened.keys.put(key)
    typer.echo(f"Key {key.id} for {key.name!r}, role {key.role}, {_tasks(key)}. It is not shown again:\n{secret}")
    if as_json:
        typer.echo(json.dumps({**_shown(key), "key": secret}))


@app.command("list")
def list_keys(store: StoreUrl = None, as_json: Json = False) -> None:
    """Show all keys, never their secrets."""
    with _opened(store) as opened:
        keys = opened.keys.list()
    for key in keys:
        limit = f"{key.per_minute} a minute" if key.per_minute else "no limit"
        typer.echo(f"{key.id}  {key.role:<8}  {limit:<14}  {key.created:%Y-%m-%d %H:%M}  {key.name}, {_tasks(key)}")
    if not keys:
        typer.echo("No keys: whoever reaches the service may use all of it.")
    if as_json:
        typer.echo(json.dumps({"keys": [_shown(key) for key in keys]}))


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, as `moepager keys list` shows it.")], store: StoreUrl = None
) -> None:
    """Take a key out of service. Revoking the last one opens the service to everybody who reaches it."""
    with _opened(store) as opened:
        opened.keys.delete(key)
        left = len(opened.keys.list())
    typer.echo(f"Key {key} is revoked; {left} are left." + ("" if left else " The service now asks for no key."))


def _refuse_unknown(tasks: Sequence[str], store: Store) -> None:
    known = sorted(each.name for each in store.tasks.list())
    for task in tasks:
        if task not in known:
            raise NotFound(
                f"No task {task!r} is in the store, so the key could not use it. It has: {', '.join(known) or 'none'}. "
                "Check the name, or create the task first."
            )


def _tasks(key: ApiKey) -> str:
    return "all tasks" if key.tasks is None else f"only {', '.join(key.tasks)}"


def _opened(url: str | None) -> Store:
    from store.database import open_store

    return open_store(load_settings(store=url).store)


def _shown(key: ApiKey) -> dict[str, object]:
    return {**{name: value for name, value in asdict(key).items() if name != "digest"}, "created": str(key.created)}
