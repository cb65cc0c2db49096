"""`moepager worker`: profiling jobs of one model, away from the service that was asked for them."""

from __future__ import annotations

import typer

from service.settings import Settings
from store.errors import InvalidInput


def serve_jobs(settings: Settings) -> None:
    """Work until a signal. Raises what could not be opened. Redis and the store may come and go."""
    if settings.redis is None:
        raise InvalidInput(
            "A worker takes its jobs from Redis: name it with --redis redis://host:6379/0 or MOEPAGER_REDIS, here and "
            "for the service. Without Redis the service runs its jobs itself.",
            param="redis",
        )
    from service.access_log import write_lines  # noqa: PLC0415
    from service.job_queue import connect, run_worker  # noqa: PLC0415 - torch comes along, after what is wrong is said
    from service.workshop import open_workshop  # noqa: PLC0415

    write_lines()
    connect(settings.redis)  # refused now, if it is no URL
    with open_workshop(settings) as workshop:
        typer.echo(f"Waiting for jobs of {workshop.folder}.")
        run_worker(workshop, settings.redis)
