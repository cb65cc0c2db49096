"""How experts are made to specialise, and how far they have: losses and figures over router logits.

B rows, S tokens a row, T = B S, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen2MoeForCausalLM

from demo.batches import Batch
from demo.tasks.registry import TASKS


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
    """Means over layers: the entropy of a row's expert use, that of the batch's, the z-loss. `valid` f32 [B, S]."""
    row, batch, z = [], [], []
    for layer in logits:
        p = layer.float().softmax(-1).view(*valid.shape, -1) * valid[..., None]  # [B, S, E]
        use = p.sum(1) / valid.sum(1, keepdim=True)  # [B, E]
        row.append(entropy(use).mean())
        batch.append(entropy(use.mean(0)))
        z.append(layer.float().logsumexp(-1).square().mean())
    return torch.stack(row).mean(), torch.stack(batch).mean(), torch.stack(z).mean()


@torch.no_grad()
def specialisation(model: Qwen2MoeForCausalLM, tap: RouterTap, batch: Batch) -> dict[str, float]:
    """Mean overlap of two tasks' top-8 experts by gate mass; the share of a task's mass in its top 8, 16 and 32."""
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
