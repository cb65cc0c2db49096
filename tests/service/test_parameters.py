"""A parameter of a URL that the route does not know is refused: a filter that is ignored asks for something else."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

MODELS = "/v1/models?api-version=preview"  # as OpenAI's clients ask that are set up for Azure


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("GET", "/v1/decisions?tsk=sql", "tsk"),
        ("GET", "/v1/jobs?state=failed", "state"),
        ("GET", "/v1/residency?experts=true&task=sql", "task"),
        ("DELETE", "/v1/unmatched?task=sql", "task"),
        ("POST", "/v1/tasks/reload?task=sql", "task"),
        ("GET", "/v1/models?limit=1", "limit"),
        ("GET", "/v1/jobs?api-version=preview", "api-version"),
    ],
)
def test_an_unknown_parameter_is_refused_by_its_name(client: TestClient, method: str, path: str, param: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_request")
    assert f"`{param}` is not a parameter of {method} {path.partition('?')[0]}" in error["message"]


def test_the_known_ones_are_named_beside_it(client: TestClient) -> None:
    assert "It has task, since, limit, before;" in client.get("/v1/decisions?page=2").json()["error"]["message"]
    assert "It has none;" in client.get("/v1/jobs?page=2").json()["error"]["message"]


def test_known_parameters_and_those_of_probes_and_pages_work(client: TestClient) -> None:
    for path in (
        "/v1/decisions?task=sql&limit=5",
        "/v1/residency?experts=true",
        "/healthz?x=1",
        "/console/?from=mail",
        MODELS,
    ):
        assert client.get(path).status_code == 200, path
