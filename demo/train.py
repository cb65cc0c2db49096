"""Trains the bundled model: a Qwen2-MoE whose experts specialise without ever being told which task a row is.

Run `python -m demo.train --out demo/model`. It is seeded, writes a checkpoint every few minutes and goes on from the
last one when it is started again. Specialisation comes from an unsupervised form of the mutual-information loss of
Mod-Squad (arXiv 2212.08066): every row (one task's text) should use few experts, the whole mixed batch all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

from engine.openmp import wait_passively

wait_passively()

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from demo.batches import Batch, batches
from demo.corpus import Pair
from demo.recipe import Recipe
from demo.specialise import RouterTap, routing_losses, specialisation
from demo.tasks.registry import TASKS
from demo.tokenizer import train_tokenizer


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
def accuracy(
    model: Qwen2MoeForCausalLM, tap: RouterTap, tokenizer: PreTrainedTokenizerFast, items: int, rng: random.Random
) -> dict[str, float]:
    """Exact match on fresh held-out-phrasing items of every task, greedy (not the items of the stored splits)."""
    model.eval()
    scores = {}
    for task in TASKS:
        pairs = [Pair(*task.held_out_item(rng)) for _ in range(items)]
        tokenizer.padding_side = "left"
        encoded = tokenizer(
            [f"<|user|>{p.prompt}<|assistant|>" for p in pairs],
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        )
        out = model.generate(**encoded, max_new_tokens=40, do_sample=False, pad_token_id=0)
        texts = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        scores[task.name] = sum(text.strip() == pair.response for text, pair in zip(texts, pairs, strict=True)) / items
        tap.take()
    model.train()
    return scores


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}, temporary
    )
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


def report(
    model: Qwen2MoeForCausalLM,
    tap: RouterTap,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    step: int,
    figures: dict[str, float],
) -> None:
    if step % 20 == 0:
        print(json.dumps({"step": step} | {k: round(v, 4) for k, v in figures.items()}), flush=True)
    if step % 200 == 0:
        held = specialisation(model, tap, next(batches(tokenizer, recipe, 10_000_000 + step)))
        print(json.dumps({"step": step} | {k: round(v, 3) for k, v in held.items()}), flush=True)
    if step % 400 == 0:
        scores = accuracy(model, tap, tokenizer, 32, random.Random(step))
        print(json.dumps({"step": step, "mean": round(sum(scores.values()) / len(scores), 3)} | scores), flush=True)


def export(
    model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, recipe: Recipe, step: int
) -> None:
    """bf16 safetensors in hub layout, with the tokenizer and the recipe that made them."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(
        json.dumps(asdict(recipe) | {"steps_done": step, "torch": torch.__version__}, indent=2) + "\n"
    )


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
