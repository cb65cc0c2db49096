"""Frames as bytes."""

from __future__ import annotations

import json

from service.sse import DataFrames, data_frame


def test_frames_that_share_their_first_fields_are_those_of_whole_bodies() -> None:
    shared = {"id": "chatcmpl-1", "created": 5, "model": 'a "quoted" näme'}
    more = {"choices": [{"index": 0, "delta": {"content": 'ü\n"\\ \u2028'}, "logprobs": None}], "usage": None}
    found = DataFrames(shared).frame(more)
    assert found == data_frame({**shared, **more})
    assert found == f"data: {json.dumps({**shared, **more}, ensure_ascii=False)}\n\n".encode()
