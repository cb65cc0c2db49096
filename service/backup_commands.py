"""`moepager backup` and `moepager restore`: a store into one file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.settings import load_settings
from store.home import default_store_url

app = typer.Typer()

StoreUrl = Annotated[str | None, typer.Option("--store", help="A database URL. Default: the embedded store.")]


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A new file. It holds texts and hashes of keys: keep it private.")],
    store: StoreUrl = None,
) -> None:
    """Write the store into one file, while the service runs. PostgreSQL needs pg_dump."""
    from store.backup import back_up
    from store.sizes import show_bytes

    back_up(load_settings(store=store).store or default_store_url(), file)
    typer.echo(f"{file}: {show_bytes(file.stat().st_size)}. `moepager restore {file}` puts it back.")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `moepager backup` wrote, of the same kind of database.")],
    store: StoreUrl = None,
    replace: Annotated[bool, typer.Option("--replace", help="A store that is there may go.")] = False,
) -> None:
    """Put a backed-up store in place, the service being stopped. PostgreSQL needs pg_restore and psql."""
    from store.backup import restore as put_back

    url = load_settings(store=store).store or default_store_url()
    put_back(url, file, replace=replace)
    typer.echo("Restored. `moepager doctor` looks at it; a running service or worker has to be started again.")
