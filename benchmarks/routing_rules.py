"""Rules that run fewer of the experts that the router chose, to save arithmetic: PESF, NAEE's skipping, LExI.

For evaluation only, on plain transformers with a hook at every router. The engine serves LExI's layers alone, as the
router's own code weighs fewer experts (profiler/calls.py), and none of the others: none frees memory that must be
planned, for any expert may still be called. A slot whose weight becomes 0 is a call that is saved.
B rows, S length, T = B S tokens, E experts, K = top_k slots a token, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from demo.prepare import DTYPE, THREADS, corpus
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.batches import Batch, Encoded, encode_corpus, pad, shards
from profiler.calls import share_out
from profiler.progress import Progress, Report
from profiler.statistics import PROMPT
from store.home import bundled_model
from store.records import F64

ROWS, TOKENS = 32, 4096
INPUTS = 512  # random or real ones, on which LExI measures a layer
SEED = 20250902

# layer, weights [T, K], index [T, K], prompt bool [B, S] -> weights [T, K]
Rule = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RuleRow:
    """`accuracy`: of the items whose response and end are the model's first choices; `calls_saved`: of all calls."""

    rule: str
    task: str
    accuracy: float
    calls_saved: float
    items: int


def pesf(alpha: float, experts: int) -> Rule:
    """PESF (arXiv 2508.01625): while a prompt is read, e goes where `c_e < alpha l K / E`, for each row and layer.

    c_e counts the row's l prompt tokens that chose e. The others' weights stay as they are; the source does not say.
    """

    def rule(_: int, weights: Tensor, index: Tensor, prompt: Tensor) -> Tensor:
        rows, length = prompt.shape
        chosen = torch.zeros(rows * length, experts).scatter(1, index, 1.0).view(rows, length, experts)  # [B, S, E]
        counts = (chosen * prompt[:, :, None]).sum(1)  # [B, E]
        floor = alpha * prompt.sum(1, keepdim=True) * index.shape[1] / experts  # [B, 1]
        rare = (counts < floor).repeat_interleave(length, 0).gather(1, index)  # [T, K]
        return weights.masked_fill(rare & prompt.flatten()[:, None], 0)

    return rule


def skipping(thresholds: Tensor) -> Rule:
    """NAEE's skipping (2402.14800): slot j is dropped where `w_j < beta_lj w_1`, the others' sum stays what it was.

    `thresholds` [L, K] are medians of `w_j / w_1` over calibration tokens. The source has K = 2; for more slots a
    threshold for each is our reading. One of 0 drops nothing.
    """

    def rule(layer: int, weights: Tensor, _: Tensor, __: Tensor) -> Tensor:
        return _rescaled(weights, weights >= thresholds[layer] * weights[:, :1])

    return rule


def fewer(active: Sequence[int]) -> Rule:
    """In layer l the `active[l]` best slots run, the others' weight goes to them."""

    def rule(layer: int, weights: Tensor, _: Tensor, __: Tensor) -> Tensor:
        return _rescaled(weights, (torch.arange(weights.shape[1]) < active[layer]).expand_as(weights))

    return rule


def bench_rules(tasks: Sequence[str], items: int, report: Report) -> list[RuleRow]:
    """Every rule on each task's test items; thresholds from its calibration items."""
    config = EngineConfig(bundled_model(), max_context=256, max_batch=ROWS, dtype=DTYPE, threads=THREADS)
    rows = []
    with Engine.open(config) as engine:
        model = _Model(bundled_model())
        noise = model.noise()
        for number, task in enumerate(tasks):
            report(Progress(task, "evaluate", number, len(tasks)))
            calibration = encode_corpus(engine, corpus(task, "calibration", items))
            errors = lexi_errors(model, noise, calibration)
            text = encode_corpus(engine, corpus(task, "test", items))
            for name, rule in _rules(errors, model.medians(calibration), engine.card.experts).items():
                rows.append(RuleRow(name, task, *model.measure(text, rule, engine.tokenizer.eos), len(text)))
    report(Progress(tasks[-1], "evaluate", len(tasks), len(tasks)))
    return rows


def rule_means(rows: Sequence[RuleRow]) -> list[RuleRow]:
    """Over the tasks, in the order of the rules."""
    groups: dict[str, list[RuleRow]] = {}
    for row in rows:
        groups.setdefault(row.rule, []).append(row)
    return [
        RuleRow(
            name,
            "mean",
            float(np.mean([row.accuracy for row in group])),
            float(np.mean([row.calls_saved for row in group])),
            sum(row.items for row in group),
        )
        for name, group in groups.items()
    ]


def lexi_errors(model: _Model, noise: Sequence[Tensor], text: Sequence[Encoded]) -> dict[str, F64]:
    """What a layer with 1 ... K slots is off by, f64 [L, K]: by LExI, and by four other ways to measure it.

    LExI takes the norm of the error on random normal inputs. A share of the output makes layers comparable that write
    at different sizes; the text's own inputs are what the layers will get; and what the model's end makes of one
    layer's error, the rest being whole, is the one measure that knows what later layers do with it.
    """
    random, sizes = model.errors(noise)
    own, own_sizes = model.errors(model.inputs(text))
    return {
        "": random,
        ", shares": random / sizes[:, None],
        ", text": own,
        ", shares on text": own / own_sizes[:, None],
        ", at the end": model.divergences(text),
    }


def _rules(errors: Mapping[str, F64], medians: Tensor, experts: int) -> dict[str, Rule]:
    layers, slots = medians.shape
    rules = {"all": fewer([slots] * layers)}
    rules |= {f"pesf {alpha:g}": pesf(alpha, experts) for alpha in (0.3, 0.7, 1.0)}
    last = torch.zeros_like(medians)
    last[:, -1] = medians[:, -1]
    rules |= {"naee, last slot": skipping(last), "naee, all slots": skipping(medians)}
    for share in (0.75, 0.5):
        budget = round(share * layers * slots)
        rules |= {f"lexi {share:g}{how}": fewer(share_out(each, budget)) for how, each in errors.items()}
        rules[f"equal layers {share:g}"] = fewer([budget // layers] * layers)
    return rules


def _rescaled(weights: Tensor, kept: Tensor) -> Tensor:
    """`weights` [T, K] inside `kept` bool [T, K], which has each token's best, with the same sum."""
    left = weights * kept
    return left * (weights.sum(1, keepdim=True) / left.sum(1, keepdim=True))


class _Model:
    """The demo's model in plain transformers: blocks with `gate` (logits, weights, index) and `experts`."""

    def __init__(self, folder: Any) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE)).eval()
        self._blocks = [layer.mlp for layer in self._model.model.layers if hasattr(layer.mlp, "gate")]
        self.slots = int(self._model.config.num_experts_per_tok)

    def noise(self) -> list[Tensor]:
        """Random normal inputs of each layer, [n, H]."""
        noise = torch.Generator().manual_seed(SEED)
        return [torch.randn(INPUTS, self._model.config.hidden_size, generator=noise) for _ in self._blocks]

    def inputs(self, text: Sequence[Encoded]) -> list[Tensor]:
        """What each layer gets of the text, [n, H]: the inputs of tokens spread evenly over it."""
        seen: list[list[Tensor]] = [[] for _ in self._blocks]
        for batch in _batches(text):
            valid = batch.mask.flatten() == 1  # [T]

            def look(block: Any, given: tuple[Tensor], valid: Tensor = valid) -> None:
                seen[self._blocks.index(block)].append(given[0].flatten(0, 1)[valid])

            handles = [block.register_forward_pre_hook(look) for block in self._blocks]
            try:
                self._forward(batch, fewer([self.slots] * len(self._blocks)))
            finally:
                for handle in handles:
                    handle.remove()
        whole = [torch.cat(each) for each in seen]
        count = min(INPUTS, len(whole[0]))
        return [each[torch.arange(count) * len(each) // count] for each in whole]

    @torch.inference_mode()
    def errors(self, inputs: Sequence[Tensor]) -> tuple[F64, F64]:
        """`|MoE_l(X; k) - MoE_l(X; K)|` for k = 1 ... K, f64 [L, K], and `|MoE_l(X; K)|` [L]; X [n, H] a layer."""
        found, sizes = [], []
        for block, x in zip(self._blocks, inputs, strict=True):
            _, weights, index = block.gate(x)
            whole = block.experts(x, index, weights)  # [n, H]
            cut = [_rescaled(weights, torch.arange(weights.shape[1]).expand_as(weights) < k + 1) for k in _slots(index)]
            found.append([float((block.experts(x, index, each) - whole).norm()) for each in cut])
            sizes.append(float(whole.norm()))
        return np.array(found), np.array(sizes)

    def divergences(self, text: Sequence[Encoded]) -> F64:
        """How far the model's next tokens move when one layer alone has k slots: KL in nats a token, f64 [L, K]."""
        layers, found = len(self._blocks), np.zeros((len(self._blocks), self.slots))
        tokens = 0
        for batch in _batches(text):
            valid = batch.mask.flatten() == 1  # [T]
            whole = self._forward(batch, fewer([self.slots] * layers)).flatten(0, 1)[valid].log_softmax(-1)  # [n, V]
            tokens += len(whole)
            for layer, count in product(range(layers), range(1, self.slots)):
                active = [count if each == layer else self.slots for each in range(layers)]
                cut = self._forward(batch, fewer(active)).flatten(0, 1)[valid].log_softmax(-1)
                found[layer, count - 1] += float((whole.exp() * (whole - cut)).sum())
        return found / tokens

    def medians(self, text: Sequence[Encoded]) -> Tensor:
        """Of `w_j / w_1` over the text's tokens: [L, K]."""
        seen: list[list[Tensor]] = [[] for _ in self._blocks]
        for batch in _batches(text):
            valid = batch.mask.flatten() == 1  # [T]

            def look(layer: int, weights: Tensor, _: Tensor, __: Tensor, valid: Tensor = valid) -> Tensor:
                seen[layer].append((weights / weights[:, :1])[valid])
                return weights

            self._forward(batch, look)
        medians = torch.stack([torch.cat(each).quantile(0.5, dim=0) for each in seen])  # [L, K]
        medians[:, 0] = 0  # the best slot always runs
        return medians

    def measure(self, text: Sequence[Encoded], rule: Rule, ends: Collection[int]) -> tuple[float, float]:
        """Accuracy, and the share of expert calls that the rule saves."""
        right, saved, calls = 0, 0, 0
        for shard, batch in zip(_shards(text), _batches(text), strict=True):
            valid = batch.mask.flatten() == 1  # [T]
            before: list[Tensor] = []

            def counted(
                layer: int, weights: Tensor, index: Tensor, prompt: Tensor,
                valid: Tensor = valid, before: list[Tensor] = before,
            ) -> Tensor:  # fmt: skip
                after = rule(layer, weights, index, prompt)
                before.append(((after == 0) & (weights != 0))[valid])  # [n, K]
                return after

            first = self._forward(batch, counted).argmax(-1).tolist()  # [B, S]
            right += sum(_right(one, choices, ends) for one, choices in zip(shard, first, strict=True))
            saved += sum(int(each.sum()) for each in before)
            calls += sum(each.numel() for each in before)
        return right / len(text), saved / calls

    @torch.inference_mode()
    def _forward(self, batch: Batch, rule: Rule) -> Tensor:
        prompt = (batch.mask == 1) & (batch.roles == PROMPT)  # [B, S]
        with self._hooked(rule, prompt):
            logits: Tensor = self._model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        return logits  # [B, S, V]

    @contextmanager
    def _hooked(self, rule: Rule, prompt: Tensor) -> Iterator[None]:
        def at(layer: int) -> Callable[[Any, Any, tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]:
            def hook(_: Any, __: Any, routed: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
                logits, weights, index = routed
                return logits, rule(layer, weights, index, prompt), index

            return hook

        handles = [block.gate.register_forward_hook(at(layer)) for layer, block in enumerate(self._blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _slots(index: Tensor) -> range:
    return range(index.shape[1])


def _shards(text: Sequence[Encoded]) -> list[list[Encoded]]:
    return list(shards(text, ROWS, TOKENS))


def _batches(text: Sequence[Encoded]) -> Iterator[Batch]:
    return (pad(shard) for shard in _shards(text))


def _right(one: Encoded, first: Sequence[int], ends: Collection[int]) -> bool:
    """`first` [S]: the model's choice after each token."""
    said = first[len(one.prompt) - 1 : len(one.tokens)]
    return tuple(said[:-1]) == one.response and said[-1] in ends
