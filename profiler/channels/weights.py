"""What the down projections alone say about channels: read once, an expert at a time. No text."""

from __future__ import annotations

import numpy as np

from engine.engine import Engine
from profiler.extras import Needs
from store.errors import CheckpointError
from store.records import F64

NORMS, SUMS = "down_norms", "down_sums"


def of_weights(engine: Engine, needs: Needs) -> dict[str, F64]:
    """Those of `needs` that the weights give, f64 `[L, E, F]` each. Raises CheckpointError for NaN among them."""
    if not needs & {NORMS, SUMS}:
        return {}
    channels, shape = engine.layers.channels, (engine.card.layers, engine.card.experts, engine.layers.channels.width)
    norms, sums = np.zeros(shape), np.zeros(shape)
    for layer in range(engine.card.layers):
        for expert, views in engine.layers.expert_weights(layer):
            down = channels.split(views).down.double()  # [F, H]
            norms[layer, expert] = down.norm(dim=1).cpu().numpy()
            sums[layer, expert] = down.abs().sum(dim=1).cpu().numpy()
            if not np.isfinite(sums[layer, expert]).all():
                raise CheckpointError(
                    f"The down projection of expert {expert} in MoE layer {layer} has NaN or infinity, so its channels "
                    "can't be scored. Check the checkpoint, or download it again."
                )
    return {name: found for name, found in ((NORMS, norms), (SUMS, sums)) if name in needs}
