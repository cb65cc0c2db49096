"""Users who ask for whole answers, several at once, and streams, and check them. Run by test_load with locust."""

from __future__ import annotations

import itertools
import json
from typing import Any

from locust import FastHttpUser, constant, task

QUERIES = itertools.cycle(["how long do I boil an egg", "select rows from orders"])


class Reader(FastHttpUser):
    """A wrong answer is a failure of the run."""

    wait_time = constant(0)

    @task
    def whole(self) -> None:
        answer = self._post("/v1/chat/completions", "whole", messages=_messages(), max_tokens=8)
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
        assert 0 < answer["usage"]["completion_tokens"] <= 8

    @task
    def several(self) -> None:
        answer = self._post("/v1/completions", "several", prompt=[next(QUERIES), next(QUERIES)], max_tokens=4, n=2)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]

    @task
    def streamed(self) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": "tiny", "messages": _messages(), "max_tokens": 8, **options}
        with self.client.post("/v1/chat/completions", json=body, name="streamed", catch_response=True) as answer:
            *_, usage, done = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            assert done == "[DONE]"
            assert 0 < json.loads(usage)["usage"]["completion_tokens"] <= 8

    def _post(self, path: str, name: str, **fields: Any) -> Any:
        return self.client.post(path, json={"model": "tiny", **fields}, name=name).json()


def _messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": next(QUERIES)}]
