"""Sparse products against dense references; gradients by finite differences on every output."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_core.kernels import autograd, eager, sparse
from sae_core.kernels.codes import Codes, codes_at, codes_where

RTOL64 = 1e-10  # float64 products of at most 60 terms, in another order


def random_codes(n: int, d_sae: int, density: float, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, d_sae, dtype=torch.float64, generator=generator)
    return codes_where(torch.rand(n, d_sae, generator=generator) < density, values)


@given(
    st.integers(1, 9), st.integers(1, 30), st.integers(1, 6), st.floats(0, 0.5), st.integers(0, 99)
)
def test_csr_products_equal_the_dense_references(n, d_sae, d, density, seed):
    codes = random_codes(n, d_sae, density, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    w = torch.randn(d_sae, d, dtype=torch.float64, generator=generator)
    g = torch.randn(n, d, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        sparse.matmul(codes, w), eager.matmul(codes, w), rtol=RTOL64, atol=RTOL64
    )
    torch.testing.assert_close(
        sparse.matmul_t(codes, g), eager.matmul_t(codes, g), rtol=RTOL64, atol=RTOL64
    )
    torch.testing.assert_close(
        sparse.sampled(codes, g, w), eager.sampled(codes, g, w), rtol=RTOL64, atol=RTOL64
    )


def test_codes_round_trip_and_starts():
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    codes = codes_where(dense > 0, dense)
    assert codes.crow.tolist() == [0, 1, 1, 3]
    assert codes.col.tolist() == [1, 0, 2]
    assert torch.equal(codes.to_dense(), dense)
    assert (codes.to_scipy().toarray() == dense.numpy()).all()
    assert codes.keep(codes.values > 1.5).crow.tolist() == [0, 1, 1, 2]


def test_codes_at_sorts_columns_and_drops_what_is_not_positive():
    codes = codes_at(
        torch.tensor([[4, 0, 2], [1, 3, 0]]), torch.tensor([[0.5, 2.0, 1.0], [0.0, -1.0, 3.0]]), 5
    )
    assert codes.crow.tolist() == [0, 3, 4]
    assert codes.col.tolist() == [0, 2, 4, 0]
    assert codes.values.tolist() == [2.0, 1.0, 0.5, 3.0]


@pytest.mark.parametrize("density", [0.08, 0.6], ids=["csr", "dense"])
@pytest.mark.parametrize("output", ["values", "x_hat"])
def test_gradcheck_of_every_output_and_input(density, output):
    n, d_in, d_sae = 6, 4, 13
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> torch.Tensor:
        t = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return t.requires_grad_()

    active = torch.rand(n, d_sae, generator=generator) < density
    assert active.any()

    def run(x, w_enc, b_enc, b_dec, w_dec):
        pre = ((x - b_dec) @ w_enc + b_enc).detach()
        codes = autograd.encode(x, w_enc, b_enc, b_dec, codes_where(active, pre))
        return codes.values if output == "values" else autograd.decode(codes, w_dec)

    inputs = (leaf(n, d_in), leaf(d_in, d_sae), leaf(d_sae), leaf(d_in), leaf(d_sae, d_in))
    assert torch.autograd.gradcheck(run, inputs)


def test_the_gradient_of_the_encoder_has_the_strides_of_its_parameter():
    w = torch.randn(7, 3).T.requires_grad_()  # as SAE stores W_enc
    x, b = torch.randn(4, 3), torch.zeros(7)
    pre = (x @ w).detach()
    codes = autograd.encode(x, w, b, torch.zeros(3), codes_where(pre > 0.5, pre))
    codes.values.sum().backward()
    assert w.grad is not None and w.grad.stride() == w.stride()
