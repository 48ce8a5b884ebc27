"""Monet's experts: n x n of them, made of n first and n second halves (arXiv 2412.04139).

Horizontal (HD, equation 12): E_ij(x) = V_j relu(U_i x + a_i)^2 + b_j

    out = sum_j V_j left(h)_j + sum_j cols_j b_j,             h_i = relu(U_i x + a_i)^2

Vertical (VD, equation 15): E_ij(x) = [V11_i p_i + V12_i r_j + b1_i ; V21_j p_i + V22_j r_j + b2_j]

    top    = sum_i V11_i (rows_i p_i) + V12_i right(r)_i + rows_i b1_i
    bottom = sum_j V21_j left(p)_j + V22_j (cols_j r_j) + cols_j b2_j
    p_i = relu(U1_i x + a1_i)^2,  r_j = relu(U2_j x + a2_j)^2

with rows, cols, left and right of ``mixing``. Names and layouts of the parameters are those of the
published checkpoints. With H heads the output is a sum over heads, not a mean.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_core.monet.mixing import Factored, Halves, Mixing


class HorizontalExperts(nn.Module):
    """u [n m, d], v [d, n m], b [n, d].

    Args:
        d_model: width d of the residual stream.
        n: halves a side.
        m: neurons of an expert.
    """

    def __init__(self, d_model: int, n: int, m: int) -> None:
        super().__init__()
        self.n = n
        self.u = nn.Linear(d_model, n * m)
        self.v = nn.Linear(n * m, d_model, bias=False)
        self.b = nn.Parameter(torch.zeros(n, d_model))

    def forward(
        self, x: Float[Tensor, "*b d"], g1: Float[Tensor, "*b h n"], g2: Float[Tensor, "*b h n"]
    ) -> Float[Tensor, "*b d"]:
        """All experts, weighted by the gates."""
        return _forward(self, x, g1, g2)

    def mixed(self, x: Float[Tensor, "t d"], by: Mixing) -> Float[Tensor, "t d"]:
        """The experts, weighted as ``by`` says."""
        return self.v(by.left(_halves(self.u(x), self.n)).flatten(-2)) + by.cols() @ self.b


class VerticalExperts(nn.Module):
    """u1, u2 [n m/2, d], v11, v12, v21, v22 [d/2, n m/2], b1, b2 [n, d/2].

    Args:
        d_model: width d of the residual stream, even.
        n: halves a side.
        m: neurons of an expert, even.
    """

    def __init__(self, d_model: int, n: int, m: int) -> None:
        super().__init__()
        self.n = n
        inner, half = n * m // 2, d_model // 2
        self.u1, self.u2 = nn.Linear(d_model, inner), nn.Linear(d_model, inner)
        self.v11, self.v12 = (nn.Linear(inner, half, bias=False) for _ in range(2))
        self.v21, self.v22 = (nn.Linear(inner, half, bias=False) for _ in range(2))
        self.b1 = nn.Parameter(torch.zeros(n, half))
        self.b2 = nn.Parameter(torch.zeros(n, half))

    def forward(
        self, x: Float[Tensor, "*b d"], g1: Float[Tensor, "*b h n"], g2: Float[Tensor, "*b h n"]
    ) -> Float[Tensor, "*b d"]:
        """All experts, weighted by the gates."""
        return _forward(self, x, g1, g2)

    def mixed(self, x: Float[Tensor, "t d"], by: Mixing) -> Float[Tensor, "t d"]:
        """The experts, weighted as ``by`` says."""
        p, r = _halves(self.u1(x), self.n), _halves(self.u2(x), self.n)
        rows, cols = by.rows(), by.cols()
        top = self.v11((rows[..., None] * p).flatten(-2)) + self.v12(by.right(r).flatten(-2))
        bottom = self.v21(by.left(p).flatten(-2)) + self.v22((cols[..., None] * r).flatten(-2))
        return torch.cat((top + rows @ self.b1, bottom + cols @ self.b2), -1)


Experts = HorizontalExperts | VerticalExperts


def _halves(pre: Float[Tensor, "t nm"], n: int) -> Halves:
    """relu^2 of the neurons, by half."""
    return pre.relu().square().unflatten(-1, (n, -1))


def _forward(experts: Experts, x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
    flat = Factored(g1.flatten(0, -3).to(x.dtype), g2.flatten(0, -3).to(x.dtype))
    return experts.mixed(x.flatten(0, -2), flat).view(x.shape)
