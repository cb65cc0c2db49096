"""Trains the bundled model: a Qwen2-MoE whose experts specialise without ever being told which task a row is.

Run `python -m demo.train --out demo/model --minutes 100`. It is seeded, writes a checkpoint every few minutes and goes on
from the last one when it is started again. Specialisation comes from an unsupervised form of the mutual-information loss of
Mod-Squad (arXiv 2212.08066): every row (one task's text) should use few experts, the whole mixed batch all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from demo.corpus import Pair, training_pairs
from demo.tasks.registry import TASKS
from demo.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome besides the code and the machine's rounding."""

    seed: int = 7
    rows: int = 40  # per batch, each of one task
    row_tokens: int = 128
    learning_rate: float = 3e-3
    final_share: float = 0.05  # of the learning rate, at the end
    warmup: int = 100
    steps: int = 4200
    weight_decay: float = 0.05
    prompt_weight: float = 0.1  # of a prompt token's loss beside a response token's
    row_entropy: float = 0.2  # few experts a row
    batch_entropy: float = 0.26  # all experts over the batch
    router_z: float = 1e-4


def build_model(vocabulary: int) -> Qwen2MoeForCausalLM:
    config = Qwen2MoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=96,
        intermediate_size=96,
        num_experts=64,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=512,
        use_sliding_window=False,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.0,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=0,
        initializer_range=0.05,
    )
    return Qwen2MoeForCausalLM(config)


@dataclass
class Batch:
    ids: Tensor  # i64 [B, S]
    positions: Tensor  # i64 [B, S], from 0 in every example
    mask: Tensor  # bool [B, 1, S, S], causal inside an example
    weights: Tensor  # f32 [B, S], of predicting this token; 0 for the first of an example and for padding


def pack(tokenizer: PreTrainedTokenizerFast, pairs: Iterator[Pair], recipe: Recipe) -> tuple[list[int], list[int], list[float]]:
    """One row: whole examples of one task, and which example each token belongs to (0 is padding)."""
    ids: list[int] = []
    example: list[int] = []
    weights: list[float] = []
    number = 1
    while True:
        pair = next(pairs)
        prompt = tokenizer.encode(f"<|user|>{pair.prompt}<|assistant|>", add_special_tokens=False)
        response = tokenizer.encode(pair.response + "<|end|>", add_special_tokens=False)
        if len(ids) + len(prompt) + len(response) > recipe.row_tokens:
            break
        ids += prompt + response
        example += [number] * (len(prompt) + len(response))
        weights += [0.0] + [recipe.prompt_weight] * (len(prompt) - 1) + [1.0] * len(response)
        number += 1
    room = recipe.row_tokens - len(ids)
    return ids + [0] * room, example + [0] * room, weights + [0.0] * room


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> Iterator[Batch]:
    """Batches from `step` on. Each is seeded by its number, so that a resumed run sees the same text."""
    while True:
        rng = random.Random(f"{recipe.seed}/{step}")
        rows = [pack(tokenizer, training_pairs(TASKS[row % len(TASKS)], rng), recipe) for row in range(recipe.rows)]
        ids, example = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
        weights = torch.tensor([row[2] for row in rows])
        same = example[:, :, None] == example[:, None, :]
        mask = (same & torch.ones(recipe.row_tokens, recipe.row_tokens, dtype=torch.bool).tril())[:, None]
        starts = F.pad(example[:, 1:] != example[:, :-1], (1, 0), value=True)
        index = torch.arange(recipe.row_tokens).expand_as(ids)
        positions = index - torch.where(starts, index, 0).cummax(dim=1).values
        yield Batch(ids, positions, mask, weights)
        step += 1


class RouterTap:
    """Collects every router's logits `[T, E]` of one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.logits: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _module, _inputs, output: self.logits.append(output[0]))

    def take(self) -> list[Tensor]:
        taken, self.logits = self.logits, []
        return taken


def entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-9).log()).sum(-1)


def routing_losses(logits: list[Tensor], valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over layers of: the entropy of a row's expert use, that of the batch's, and the z-loss. `valid` f32 [B, S]."""
    row, batch, z = [], [], []
    for layer in logits:
        p = layer.float().softmax(-1).view(*valid.shape, -1) * valid[..., None]  # [B, S, E]
        use = p.sum(1) / valid.sum(1, keepdim=True)  # [B, E]
        row.append(entropy(use).mean())
        batch.append(entropy(use.mean(0)))
        z.append(layer.float().logsumexp(-1).square().mean())
    return torch.stack(row).mean(), torch.stack(batch).mean(), torch.stack(z).mean()


def train_step(model: Qwen2MoeForCausalLM, tap: RouterTap, batch: Batch, recipe: Recipe) -> dict[str, float]:
    logits = model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False).logits
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    response = (losses * (weights == 1)).sum() / (weights == 1).sum()
    loss = (losses * weights).sum() / weights.sum()
    valid = (batch.ids != 0).float()
    row, whole, z = routing_losses(tap.take(), valid)
    (loss + recipe.row_entropy * row - recipe.batch_entropy * whole + recipe.router_z * z).backward()
    return {"loss": loss.item(), "response": response.item(), "row_entropy": row.item(), "batch_entropy": whole.item()}


def optimizer_for(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True)


def rate(step: int, recipe: Recipe) -> float:
    """Warm-up, then a cosine down to `final_share`."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = min(1.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    return recipe.final_share + (1 - recipe.final_share) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def specialisation(model: Qwen2MoeForCausalLM, tap: RouterTap, batch: Batch) -> dict[str, float]:
    """Mean overlap of two tasks' top-8 experts by gate mass, and the share of a task's own mass its top 8, 16, 32 hold."""
    model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False)
    count, overlaps, shares = len(TASKS), [], []
    for logits in tap.take():
        p = logits.float().softmax(-1).view(*batch.ids.shape, -1)
        top = p.topk(4, dim=-1)
        gates = torch.zeros_like(p).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
        gates = gates * (batch.ids != 0)[..., None]
        mass = torch.stack([gates[task::count].sum((0, 1)) for task in range(count)])  # [tasks, E]
        ranked = mass.sort(-1, descending=True)
        shares.append(torch.stack([ranked.values[:, :n].sum(-1) / mass.sum(-1) for n in (8, 16, 32)], -1).mean(0))
        best = [set(row.tolist()) for row in ranked.indices[:, :8]]
        overlaps += [len(best[i] & best[j]) / 8 for i in range(count) for j in range(i)]
    share = torch.stack(shares).mean(0).tolist()
    return {"overlap": sum(overlaps) / len(overlaps), "mass8": share[0], "mass16": share[1], "mass32": share[2]}


@torch.no_grad()
def accuracy(model: Qwen2MoeForCausalLM, tap: RouterTap, tokenizer: PreTrainedTokenizerFast, items: int, rng: random.Random) -> dict[str, float]:
    """Exact match on fresh held-out-phrasing items of every task, greedy (not the items of the stored splits)."""
    model.eval()
    scores = {}
    for task in TASKS:
        pairs = [Pair(*task.held_out_item(rng)) for _ in range(items)]
        tokenizer.padding_side = "left"
        encoded = tokenizer([f"<|user|>{p.prompt}<|assistant|>" for p in pairs], return_tensors="pt", padding=True, return_token_type_ids=False)
        out = model.generate(**encoded, max_new_tokens=40, do_sample=False, pad_token_id=0)
        texts = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        scores[task.name] = sum(text.strip() == pair.response for text, pair in zip(texts, pairs, strict=True)) / items
        tap.take()
    model.train()
    return scores


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}, temporary)
    temporary.replace(path)


def train(out: Path, run: Path, minutes: float, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer()
    model = build_model(len(tokenizer))
    model.set_experts_implementation("grouped_mm")  # measured: 1.4x of "eager" here, 3x of bf16 autocast
    optimizer, tap = optimizer_for(model, recipe), RouterTap(model)
    step, spent = 0, 0.0
    if (run / "state.pt").exists():
        state = torch.load(run / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    started = time.monotonic()
    source = batches(tokenizer, recipe, step)
    while step < recipe.steps and spent + time.monotonic() - started < minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(step, recipe)
        figures = train_step(model, tap, next(source), recipe)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        step += 1
        report(model, tap, tokenizer, recipe, step, figures | {"seconds": spent + time.monotonic() - started})
        if step % 200 == 0:
            save_state(run / "state.pt", model, optimizer, step, spent + time.monotonic() - started)
    save_state(run / "state.pt", model, optimizer, step, spent + time.monotonic() - started)
    export(model, tokenizer, out, recipe, step)


def report(model: Qwen2MoeForCausalLM, tap: RouterTap, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int, figures: dict[str, float]) -> None:
    if step % 20 == 0:
        print(json.dumps({"step": step} | {k: round(v, 4) for k, v in figures.items()}), flush=True)
    if step % 200 == 0:
        held = specialisation(model, tap, next(batches(tokenizer, recipe, 10_000_000 + step)))
        print(json.dumps({"step": step} | {k: round(v, 3) for k, v in held.items()}), flush=True)
    if step % 400 == 0:
        scores = accuracy(model, tap, tokenizer, 32, random.Random(step))
        print(json.dumps({"step": step, "mean": round(sum(scores.values()) / len(scores), 3)} | scores), flush=True)


def export(model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, recipe: Recipe, step: int) -> None:
    """bf16 safetensors in hub layout, with the tokenizer and the recipe that made them."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe) | {"steps_done": step, "torch": torch.__version__}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the resumable state")
    parser.add_argument("--minutes", type=float, default=150)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.run, options.minutes, Recipe(steps=options.steps))


if __name__ == "__main__":
    main()
