"""Muon: momentum whose matrix updates are made orthogonal. https://kellerjordan.github.io/posts/muon/

Every singular value of an update becomes about 1, so rare directions learn as fast as common ones. Written out here,
and not `torch.optim.Muon`, because that one orthogonalises in bfloat16, which costs 7 times the float32 product on a
CPU without bfloat16 instructions, and because torch 2.6 does not have it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly: Newton-Schulz iteration with the coefficients of Muon's author, which
    trade exactness (singular values end between 0.7 and 1.2) for speed. (rows, columns) -> same shape."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the root mean square 0.2 that AdamW's updates have, so that both
    share one learning rate (https://arxiv.org/abs/2502.16982). Weight decay is decoupled. Matrices only."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
