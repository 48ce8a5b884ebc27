"""Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) by torch's fused kernel.

The update is `torch.optim.adam.adam` and the numbers are those of ``torch.optim.Adam(fused=True)``.
Only its class is missing: the constructor of every torch optimiser imports the compiler, 140 MiB
and a second that training makes no use of (torch 2.13).
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

# a block's four matrices stay in the last cache between the update and the norms: at 18,432 latents
# of width 576 a tenth of a step
BLOCK_ROWS = 512
# glibc gives larger blocks back to the system, and each page of new ones costs a fault: at 18,432
# latents of width 576 a tenth of a step and more
KEPT_ABOVE = 32 << 20


class Adam:
    """Moments of the parameters of several groups, each with a rate of its own."""

    def __init__(self, groups: list[dict[str, Any]], lr: float = 0.0) -> None:
        """Args:
        groups: dictionaries with ``params``; ``lr`` may be among their other entries.
        """
        common = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8}
        self.param_groups = [common | group for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """step, exp_avg and exp_avg_sq of every parameter that had a gradient."""
        self.used_up: dict[Tensor, Tensor] = {}
        """Large gradients that were, whose memory the next ones may take."""

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """The group that a parameter is in."""
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter; zeros before its first step."""
        if parameter not in self.state:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        return self.state[parameter]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.forget(parameter)

    def forget(self, parameter: Tensor) -> None:
        """Forget a gradient; the memory of a large one on the processor is kept for the next."""
        grad, parameter.grad = parameter.grad, None
        if grad is not None and grad.device.type == "cpu" and grad.nbytes > KEPT_ABOVE:
            self.used_up[parameter] = grad

    def room(self, parameter: Tensor) -> list[Tensor]:
        """Memory for the next gradient: one matrix, or none. Whoever takes it out owns it."""
        kept = self.used_up.pop(parameter, None)
        return [] if kept is None else [kept]

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.moments(p) for p in params]
            grads = [p.grad for p in params]
            means = [state["exp_avg"] for state in states]
            squares = [state["exp_avg_sq"] for state in states]
            _update(params, grads, means, squares, [state["step"] for state in states], group)

    @torch.no_grad()
    def unit_rows(self, parameter: Tensor) -> None:
        """Update a matrix, each row of which then gets unit norm, a block of rows at a time.

        The gradient is used up: `step` afterwards updates the other parameters.

        Args:
            parameter: [d_sae, d], one of the optimiser's, with a gradient.
        """
        assert parameter.grad is not None
        group = self.group_of(parameter)
        state = self.moments(parameter)
        matrices = (parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for rows, g, m, v in zip(*(t.split(BLOCK_ROWS) for t in matrices), strict=True):
            _update([rows], [g], [m], [v], [state["step"].clone()], group)
            rows /= rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        state["step"] += 1
        self.forget(parameter)


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    """torch's kernel on tensors that share their group's settings; counts the steps up."""
    adam(
        params,
        grads,
        means,
        squares,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )
