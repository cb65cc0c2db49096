"""The table of docs/families.md: which architectures of transformers can be served, and what was checked of each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.conformance import ITEMS, RULES, TOLERANCE, Subject, open_subject, plain_statistics
from engine.tiny_config import moe_families
from profiler.batches import encode_corpus
from profiler.corpus import gather
from store.checkpoint import CheckpointMap
from store.errors import UnsupportedFamily
from store.experts import ExpertMap
from store.records import ExpertKey

MARK = "<!-- Made by `moepager bench families --out docs/families.md`; a test compares. Edit only above. -->"
SERVED_HEAD = "| family | model class | routing | an expert's tensors | rules that hold |\n|---|---|---|---|---|\n"
REFUSED_HEAD = "| family | model class | why it is refused |\n|---|---|---|\n"
ALL = "all"


@dataclass(frozen=True, slots=True)
class Row:
    """One family. `refused` is the reason, or empty; `holds` names the rules that were kept, or says all."""

    family: str
    model_class: str
    routing: str = ""
    layout: str = ""
    holds: str = ""
    refused: str = ""

    @property
    def line(self) -> str:
        """Its line of the table."""
        cells = (self.refused,) if self.refused else (self.routing, self.layout, self.holds)
        return f"| {' | '.join((f'`{self.family}`', self.model_class, *cells))} |"


def examine(family: str) -> Row:
    """Write a tiny checkpoint, open it, and hold it to every rule."""
    model_class = moe_families()[family]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject = open_subject(family, Path(folder) / family)
        except UnsupportedFamily as error:
            return Row(family, model_class, refused=str(error).replace(folder, "").replace("|", "/"))
        with subject.engine:
            kept = [name for name, rule in RULES.items() if rule(subject) <= TOLERANCE]
            holds = ALL if len(kept) == len(RULES) else ", ".join(kept)
            return Row(family, model_class, _routing(subject), _layout(subject), holds)


def bench_families(only: Sequence[str] = ()) -> Iterator[Row]:
    """Every family, or those of `only`, in the order of the alphabet."""
    for family in sorted(only or moe_families()):
        yield examine(family)


def table(rows: Sequence[Row]) -> str:
    """What stands under the mark in docs/families.md."""
    served, refused = ([row for row in rows if bool(row.refused) == no] for no in (False, True))
    parts = [f"{MARK}\n\n## Served ({len(served)})\n\n{SERVED_HEAD}", "\n".join(row.line for row in served)]
    parts += [f"\n\n## Refused ({len(refused)})\n\n{REFUSED_HEAD}", "\n".join(row.line for row in refused), "\n"]
    return "".join(parts)


def write_table(rows: Sequence[Row], page: Path) -> None:
    """Replace what stands under the page's mark."""
    page.write_text(page.read_text().split(MARK)[0] + table(rows))


def _routing(subject: Subject) -> str:
    """In words, from what the plain model's routers gave."""
    text = encode_corpus(subject.engine, gather(ITEMS))
    layer = plain_statistics(subject, [one.tokens for one in text])[0]
    logits, weights, index = (torch.cat(each) for each in (layer.logits, layer.weights, layer.index))
    best = logits.topk(index.shape[1], dim=-1).indices.sort(-1).values  # [T, k]
    chosen = "the best logits" if best.equal(index.long().sort(-1).values) else "the best after a bias"
    sums = weights.sum(-1)  # [T]
    if torch.allclose(sums, sums[:1], rtol=1e-4):
        return f"{chosen}; weights add up to {sums[0]:.3g}"
    return f"{chosen}; weights as they are"


def _layout(subject: Subject) -> str:
    checkpoint = CheckpointMap.open(subject.folder)
    experts = ExpertMap.build(checkpoint)
    parts = [part.projection for part in experts.span(ExpertKey(0, 0)).parts]
    single = f"{experts.modules[0]}.0.{parts[0]}" in checkpoint.tensors
    names = ", ".join(name.removesuffix(".weight") for name in parts)
    as_stored = "read as stored" if subject.engine.bank.layout.direct else "rearranged"
    return f"{'its own' if single else 'slices of all'}: {names}; {as_stored}"
