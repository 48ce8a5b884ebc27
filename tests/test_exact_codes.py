"""Codes proposed by a product in bfloat16 are those of a look at every entry."""

import numpy as np
import pytest
import torch

from sae_core.kernels import active
from sae_core.kernels.codes import codes_where
from sae_core.kernels.compiled import has_threads
from sae_core.sae import SAE, SAEConfig

ROUNDING = 2e-6  # of a dot product of unit vectors in float32

pytestmark = pytest.mark.skipif(
    not has_threads(), reason="numba is not installed: it comes with the extra 'cpu'."
)


def batch(n: int = 300, d: int = 576, m: int = 2048) -> tuple[torch.Tensor, ...]:
    """Tokens and latents of norm 1 that share a direction, at biases that let some 2% fire."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(d, generator=generator)
    x, w = (torch.randn(k, d, generator=generator) + 0.5 * shared for k in (n, m))
    x, w = (torch.nn.functional.normalize(t) for t in (x, w))
    return x, w, -(x @ w.T).quantile(0.98, dim=0) + 0.01 * torch.randn(m, generator=generator)


def test_codes_are_those_of_a_look_at_every_entry() -> None:
    x, w, b = batch()
    from sae_core.kernels import cpu

    nothing = torch.zeros(len(x), len(w))
    all_entries = codes_where(nothing == 0, nothing)
    y = (cpu.sampled(all_entries, x, w) + b.repeat(len(x))).view(len(x), len(w))
    codes = active.exact_codes(x, w.T, b)
    row, col = (y > 0).nonzero(as_tuple=True)
    assert torch.equal(codes.row, row) and torch.equal(codes.col, col)
    assert torch.equal(codes.values, y[row, col])
    assert 0.01 < codes.density < 0.05
    exact = x.double() @ w.T.double() + b
    np.testing.assert_allclose(codes.values, exact[row, col], atol=ROUNDING)
    in_half = active.active_codes(x, w.T, b, dtype=torch.bfloat16)
    assert len(in_half.col) != len(codes.col)  # control: without the margin some are lost


@pytest.mark.parametrize("size", [1.0, 2.0**-20, 2.0**20])
def test_rounding_that_all_goes_one_way_loses_nothing(size: float) -> None:
    d = 512
    x, w = torch.ones(2, d), torch.ones(3, d)
    x[:, : d // 2] += 0.49 * 2**-7  # 1 in bfloat16
    w[:, : d // 2] += 0.49 * 2**-7
    w[:, d // 2 :] = -1
    x, b = x * size, torch.tensor([-1.5, -1.9, -2.0]) * size  # y - b is 1.96 size: 0 in bfloat16
    codes = active.exact_codes(x, w.T, b)
    assert codes.col.tolist() == [0, 1] * 2
    assert len(active.active_codes(x, w.T, b, dtype=torch.bfloat16).col) == 0  # control
    none = active.exact_codes(x[:0], w.T, b)
    assert none.crow.tolist() == [0] and len(none.values) == 0


def test_a_code_depends_on_its_token_alone() -> None:
    x, w, b = batch()
    whole, part = active.exact_codes(x, w.T, b), active.exact_codes(x[100:137], w.T, b)
    inside = (whole.row >= 100) & (whole.row < 137)
    assert torch.equal(part.col, whole.col[inside])
    assert torch.equal(part.values, whole.values[inside])


@pytest.mark.parametrize("gate", ["jumprelu", "relu"])
def test_an_sae_takes_the_quicker_way(gate, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = batch()
    sae = SAE(SAEConfig(576, 2048, k=32, gate=gate)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(w.T)
        sae.b_enc.copy_(b)
    calls: list[int] = []
    real = active.exact_codes
    monkeypatch.setattr(active, "exact_codes", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(active, "_has_bfloat16", lambda: True)
    quick = sae.encode_sparse(3 * x)
    assert calls == [1]
    sae.encode_sparse(x[:10])  # few tokens: converting the latents would take longer
    monkeypatch.setattr(active, "_has_bfloat16", lambda: False)
    plain = sae.encode_sparse(3 * x)
    assert calls == [1]
    np.testing.assert_allclose(quick.to_dense(), plain.to_dense(), atol=ROUNDING)
    assert quick.values.min() > 0
