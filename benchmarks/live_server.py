"""An application under a real uvicorn in a thread of this process, on a free port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from service.server import listen


@contextmanager
def served(app: FastAPI, **options: Any) -> Iterator[str]:
    """Its URL, once it is ready; the server has ended when the block has. `options` are uvicorn's."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, **options)
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            while not server.started or httpx.get(f"{url}/readyz").status_code != 200:
                time.sleep(0.01)
            yield url
        finally:
            server.should_exit = True
            thread.join()
