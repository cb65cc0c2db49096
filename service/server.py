"""`moepager serve`: prepare, show the plan, listen, and end with the right message and exit code."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import typer

from engine.card import ModelCard
from engine.plan import plan_memory
from service.model import engine_config
from service.planning import show_memory
from service.serving import Catalogue
from service.settings import Settings
from store.database import open_store
from store.errors import InvalidInput, MoepagerError
from store.fingerprint import Fingerprint
from store.home import default_store_url
from store.records import GENERALIST


def run_server(settings: Settings) -> None:
    """Serve until a signal. Raises what could not be opened, before or after the port is bound."""
    config = engine_config(settings)
    card = ModelCard.read(config.model)
    typer.echo(show_memory(card, plan_memory(card, config)))
    if settings.model is None:
        prepare_demo(settings, card.hashes)
    from service.tracing import exporting  # noqa: PLC0415 - for those who want traces

    with exporting(settings.traces), listen(settings.host, settings.port) as bound:
        serve(settings, bound)


def serve(settings: Settings, bound: socket.socket) -> None:
    # Seconds to import, torch among them: the plan is shown and what is wrong refused before.
    import uvicorn  # noqa: PLC0415

    from service.access_log import write_lines  # noqa: PLC0415
    from service.app import create_app  # noqa: PLC0415
    from service.connections import connections_of  # noqa: PLC0415
    from service.draining import LAST_WORDS_SECONDS, Draining, Server  # noqa: PLC0415
    from service.parts import open_parts  # noqa: PLC0415

    write_lines()

    def stop() -> None:
        server.should_exit = True

    draining = Draining(settings.grace_seconds, stop)
    app = create_app(lambda: open_parts(settings), stop, settings.redis, draining, settings.body_timeout)
    config = uvicorn.Config(
        app,
        http=connections_of(settings.connections),
        access_log=False,
        log_config=None,  # its words go where ours go
        timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
    )
    server = Server(config, draining)
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"Listening on http://{shown}:{port}; /readyz answers 200 once the model is loaded.")
    server.run(sockets=[bound])
    failure = app.state.opening.failure
    if failure is not None:
        raise failure
    if server.told == signal.SIGINT:
        raise KeyboardInterrupt


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is refused before the model loads."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise InvalidInput(
            f"Can't listen on {host}, port {port}: {error.strerror}. Choose another --port or --host.", param="port"
        ) from error
    # Connections inherit it. asyncio would set it, but not on a socket whose protocol number it can't see, and then the
    # second packet of every answer waits 40 ms for the client's acknowledgement of the first.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


def prepare_demo(settings: Settings, model: Fingerprint) -> None:
    """Profile the bundled model's tasks where the store lacks them. The demo room does it, as a process: the service
    imports neither it nor the profiler. The generalist comes last, so its evidence says that all is there."""
    with open_store(settings.store) as store:
        last = Catalogue.read(store, model).tasks.get(GENERALIST)
    if last is not None and last.candidates:
        return
    typer.echo("The store lacks profiles of the bundled model: profiling its tasks first, which takes some minutes.")
    command = [sys.executable, "-m", "demo", "prepare", "--store", settings.store or default_store_url()]
    done = subprocess.run(command, check=False)  # noqa: S603 - our own module
    if done.returncode:
        raise MoepagerError(
            f"Profiling the bundled model failed with exit code {done.returncode}; its own message is above. "
            "Put that right, or serve a model of your own with --model."
        )
