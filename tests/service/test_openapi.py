"""Whatever a client makes of the published description, the service answers with no 5xx, and as described."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from service.app import create_app
from service.parts import open_parts
from service.settings import Settings

DESCRIPTION = schemathesis.openapi.from_dict(create_app(nullcontext).openapi())  # type: ignore[arg-type]
OPERATIONS = [found.ok() for found in DESCRIPTION.get_all_operations()]
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def address(
    half_settings: Settings,
    stock: Callable[[str], None],
    live: Callable[..., AbstractContextManager[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A live server with a store of its own: requests made up here delete tasks, too."""
    url = f"sqlite:///{tmp_path_factory.mktemp('openapi') / 'store.db'}"
    stock(url)
    with (
        open_parts(half_settings.model_copy(update={"store": url})) as parts,
        live(create_app(lambda: nullcontext(parts))) as served,
    ):
        yield served


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.label)
def test_no_request_breaks_the_service(operation: schemathesis.schemas.APIOperation, address: str) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    def ask(case: schemathesis.Case) -> None:
        response = case.call(base_url=address, timeout=60)
        case.validate_response(response, checks=CHECKS)

    ask()
    if operation.label == "POST /v1/drain":  # else nothing that follows is let in
        assert httpx.delete(f"{address}/v1/drain").status_code == 200
