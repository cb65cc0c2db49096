"""Plain transformers models as the slow truth of `bench families`: nothing here knows how the engine does it.

L MoE layers, E experts a layer, M of them kept, T tokens, k experts a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from store.checkpoint import CheckpointMap
from store.experts import COUNTS, ExpertMap
from store.records import F64, Selection

BINS = 256
EDGE = 1e-5  # how far a share may be off for rounding: more than that, and it is in another bin for a reason


def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def smaller_model(folder: Path, selection: Selection) -> Any:
    """transformers' own model with M experts a layer, given those of `selection` (as many in every layer).

    Whatever has another shape than in the whole model, the router's rows above all, is cut along that axis.
    """
    kept = len(selection.experts[0])
    config = AutoConfig.from_pretrained(folder)
    for scope in (config, getattr(config, "text_config", None)):
        for name in COUNTS:
            if isinstance(getattr(scope, name, None), int):
                setattr(scope, name, kept)
    small = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    layers = ExpertMap.build(CheckpointMap.open(folder)).layers
    whole = plain_model(folder).state_dict()
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            tensor.copy_(_cut(name, whole[name], tensor.shape, dict(zip(layers, selection.experts, strict=True))))
    return small


def _cut(name: str, tensor: Tensor, shape: Sequence[int], kept: dict[int, tuple[int, ...]]) -> Tensor:
    differing = [dim for dim, (was, now) in enumerate(zip(tensor.shape, shape, strict=True)) if was != now]
    if not differing:
        return tensor
    layer = max(int(word) for word in name.split(".") if word.isdecimal())
    [dim] = differing
    return tensor.index_select(dim, torch.tensor(kept[layer]))


def logits_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, S, V]"""
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
        logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits.float()


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """The likeliest continuation, every token by a whole forward: no cache."""
    ids = list(prompt)
    for _ in range(tokens):
        row = torch.tensor([ids])  # [1, S]
        ids.append(int(logits_of(model, row, torch.ones_like(row))[0, -1].argmax()))
    return ids[len(prompt) :]


class LayerSums:
    """Of one MoE layer: sums over every token, one token and one expert at a time, and all that was routed.

    `sums` has the names of profiler/statistics.py and of the extras that need no look inside an expert. `tails` f64
    [2, E, 256]: the sum of the histogram from each bin on, with every share a hair smaller, and a hair larger.
    """

    def __init__(self, experts: int, hidden: int) -> None:
        of_experts = ("selected", "gates", "norms", "squared_norms", "gated_norms", "shifted_norms", "peak")
        self.sums = {name: np.zeros(experts) for name in (*of_experts, "top_logits", "pool_logits")}
        self.sums |= {name: np.zeros((experts, experts)) for name in ("coactivations", "logit_products")}
        self.sums |= {"top_shares": np.zeros(()), "output_sums": np.zeros((experts, hidden))}
        self.tails = np.zeros((2, experts, BINS))
        self.logits: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.index: list[Tensor] = []

    def add(
        self, module: Any, routed: tuple[Tensor, Tensor, Tensor], states: Tensor, before: Tensor, y: Tensor
    ) -> None:
        """`routed` as the router gave it, `states` [T, H] what the experts read, `before` [T, H] the residual stream,
        `y` [T, H] what the experts gave."""
        logits, weights, index = (part.double() for part in routed)  # [T, E], [T, k], [T, k]
        for kept, part in zip((self.logits, self.weights, self.index), (logits, weights, index), strict=True):
            kept.append(part)
        shift = (1 - torch.cosine_similarity(before.double(), (before + y).double(), dim=-1)).clamp_min(0)  # [T]
        for t in range(len(states)):
            chosen = index[t].long().tolist()
            self._add_logits(logits[t].numpy(), len(chosen))
            for expert, weight in zip(chosen, weights[t].tolist(), strict=True):
                alone = type(module).forward(module, states[t : t + 1], torch.tensor([[expert]]), torch.ones(1, 1))
                self._add_output(expert, weight, float(shift[t]), alone.double()[0].numpy())
                for other in chosen:
                    self.sums["coactivations"][expert, other] += 1

    def _add_logits(self, z: F64, top_k: int) -> None:
        """Of one token, `z` [E]."""
        pool = np.argsort(-z, kind="stable")[:top_k].tolist()
        shares = np.exp(z[pool] - z[pool].max()) / np.exp(z[pool] - z[pool].max()).sum()  # [k]
        self.sums["top_logits"][pool[0]] += z[pool[0]]
        self.sums["top_shares"] += shares[0]
        self.sums["logit_products"] += np.outer(z - z.mean(), z - z.mean())
        for expert, share in zip(pool, shares.tolist(), strict=True):
            self.sums["pool_logits"][expert] += z[expert]
            for side, moved in enumerate((share - EDGE, share + EDGE)):
                if moved >= 1 / top_k:
                    bin_ = min(int((moved - 1 / top_k) / (1 - 1 / top_k) * BINS), BINS - 1) if top_k > 1 else 0
                    self.tails[side, expert, : bin_ + 1] += max(z[expert], 1 / (1 + np.exp(-z[expert])))

    def _add_output(self, expert: int, weight: float, shift: float, o: F64) -> None:
        """Of one token and one of its experts, `o` [H]."""
        norm = float(np.sqrt((o * o).sum()))
        for name, value in (
            ("selected", 1.0), ("gates", weight), ("norms", norm), ("squared_norms", norm * norm),
            ("gated_norms", weight * norm), ("shifted_norms", shift * weight * norm),
        ):  # fmt: skip
            self.sums[name][expert] += value
        self.sums["peak"][expert] = max(self.sums["peak"][expert], np.abs(o).max())
        self.sums["output_sums"][expert] += o


def statistics_of(
    model: Any, rows: Sequence[Sequence[int]], owners: Sequence[str], experts: int, hidden: int
) -> list[LayerSums]:
    """Each of `rows` alone through the plain model; `owners` are the experts modules by name."""
    layers = [LayerSums(experts, hidden) for _ in owners]
    with torch.inference_mode():
        for row in rows:
            with _watched(model, owners, layers):
                model(input_ids=torch.tensor([row]), use_cache=False)
    return layers


@contextmanager
def _watched(model: Any, owners: Sequence[str], layers: Sequence[LayerSums]) -> Iterator[None]:
    handles: list[Any] = []
    for owner, layer in zip(owners, layers, strict=True):
        words = owner.split(".")
        at = max(place for place, word in enumerate(words) if word.isdecimal())
        decoder = model.get_submodule(".".join(words[: at + 1]))
        tape = _Tape(layer)
        handles += [module.register_forward_hook(tape.called, with_kwargs=True) for module in decoder.modules()]
        child = model.get_submodule(".".join(words[: at + 2]))
        handles.append(child.register_forward_pre_hook(tape.entered, with_kwargs=True))
        handles.append(model.get_submodule(owner).register_forward_hook(tape.mixed, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Tape:
    """Every call inside one decoder layer, and what follows from them once its experts have run."""

    def __init__(self, layer: LayerSums) -> None:
        self.layer = layer
        self.calls: list[tuple[Any, Any, Any]] = []  # module, first argument, output
        self.entry: Any = None

    def called(self, module: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        self.calls.append((module, next(iter((*args, *named.values())), None), output))

    def entered(self, _: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.entry = next(iter((*args, *named.values())))

    def mixed(self, module: Any, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        states, index, weights = (*args, *named.values())
        routed = next(out for _, _, out in self.calls if isinstance(out, tuple) and any(part is index for part in out))
        self.layer.add(module, (routed[0], weights, index), states, self._before(), output)

    def _before(self) -> Tensor:
        """The residual stream: what went into the norm that made the block's input, or that input itself."""
        for module, given, output in self.calls:
            if "norm" in type(module).__name__.lower() and output.data_ptr() == self.entry.data_ptr():
                before: Tensor = given.reshape(-1, given.shape[-1])
                return before
        states: Tensor = self.entry.reshape(-1, self.entry.shape[-1])
        return states
