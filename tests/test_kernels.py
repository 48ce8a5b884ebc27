"""Sparse products against dense references; gradients by finite differences on every output."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_core.kernels import active, autograd, eager, sparse
from sae_core.kernels.adam import Adam
from sae_core.kernels.codes import Codes, codes_at, codes_where
from sae_core.nonlinearity import kth_largest

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


@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from(["float64", "float32", "bfloat16"]),
    st.sampled_from([None, 0.0, 0.4]),
)
def test_above_finds_what_nonzero_finds(n, m, dtype, floor):
    generator = torch.Generator().manual_seed(n * m)
    matrix = torch.randn(n, m, generator=generator).to(getattr(torch, dtype)) - 1
    matrix[0, 0] = -0.0
    floor = None if floor is None else torch.tensor(floor)
    row, col = (matrix > (0 if floor is None else floor)).nonzero(as_tuple=True)
    found = active.above(matrix, floor)
    assert torch.equal(found[0], row) and torch.equal(found[1], col)


@given(st.integers(1, 400), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_kth_largest_is_that_of_a_sort(n, share, with_ties, seed):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    values = values.round() if with_ties else values
    k = max(1, round(share * n))
    assert kth_largest(values, k) == values.sort(descending=True).values[k - 1]


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("with_threshold", [False, True])
def test_active_codes_in_blocks_are_those_of_the_whole_product(rows, with_threshold, monkeypatch):
    monkeypatch.setattr(active, "LEAST_ROWS", rows)
    monkeypatch.setattr(active, "BLOCK_BYTES", 0)
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(*shape, generator=generator).double() for shape in ((7, 5), (12, 5)))
    b, threshold = (torch.randn(12, generator=generator).double() for _ in range(2))
    threshold = threshold if with_threshold else None
    pre = x @ w.T + b
    expected = codes_where(pre > (0 if threshold is None else threshold), pre)
    codes = active.active_codes(x, w.T, b, threshold, torch.float64)
    assert torch.equal(codes.crow, expected.crow) and torch.equal(codes.row, expected.row)
    assert torch.equal(codes.col, expected.col)
    torch.testing.assert_close(codes.values, expected.values, rtol=RTOL64, atol=RTOL64)


def test_a_narrow_product_decides_and_the_values_are_exact():
    generator = torch.Generator().manual_seed(6)
    x, w = (torch.randn(*shape, generator=generator) for shape in ((64, 24), (96, 24)))
    b = torch.full((96,), -6.0)
    codes = active.active_codes(x, w.T, b, dtype=torch.bfloat16)
    pre = torch.addmm(b, x, w.T)
    narrow = torch.addmm(b.bfloat16(), x.bfloat16(), w.T.bfloat16())
    assert torch.equal(codes.to_dense() != 0, narrow > 0) and 0 < len(codes.col) < 64 * 96 / 4
    torch.testing.assert_close(codes.values, pre[codes.row, codes.col])
    assert active.active_codes(x[:0], w.T, b).crow.tolist() == [0]


def test_grouped_codes_carry_their_order_by_latent():
    codes = random_codes(9, 40, 0.2, 1)
    grouped = codes.grouped()
    assert grouped.by_latent is not None and grouped.grouped() is grouped
    order, starts = grouped.by_latent
    assert torch.equal(codes.col[order], codes.col.sort(stable=True).values)
    assert torch.equal(order, codes.col.argsort(stable=True))
    assert torch.equal(starts.diff(), torch.bincount(codes.col, minlength=40))
    assert grouped.with_values(-codes.values).by_latent is grouped.by_latent
    assert grouped.keep(codes.values > 0).by_latent is None
    g = torch.randn(9, 4, dtype=torch.float64)
    assert torch.equal(sparse.matmul_t(grouped, g), sparse.matmul_t(codes, g))


def test_adam_is_that_of_torch_bit_for_bit():
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(9, 7, generator=generator), torch.randn(3, generator=generator)]
    mine, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    plain = torch.optim.Adam([{"params": [p]} for p in theirs], lr=0.01, fused=True)
    adam = Adam([{"params": [p]} for p in mine], lr=0.01)
    for step in range(4):
        for one, other in zip(mine, theirs, strict=True):
            if step == 1 and one.ndim == 1:  # no gradient, no step
                continue
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in (adam, plain):
            optimizer.param_groups[1]["lr"] = 0.1
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in mine)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for one, other in zip(mine, theirs, strict=True):
        assert all(torch.equal(adam.state[one][k], v) for k, v in plain.state[other].items())


def test_rows_updated_block_by_block_are_those_of_a_step_and_a_projection(monkeypatch):
    monkeypatch.setattr("sae_core.kernels.adam.BLOCK_ROWS", 4)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(9, 64, generator=generator), torch.randn(3, generator=generator)]
    mine, plain = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    blocked, whole = (Adam([{"params": [p]} for p in ps], lr=0.01) for ps in (mine, plain))
    for _ in range(3):
        for one, other in zip(mine, plain, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        blocked.unit_rows(mine[0])
        assert mine[0].grad is None
        blocked.step()
        whole.step()
        plain[0].data /= plain[0].norm(dim=1, keepdim=True)
        for optimizer in (blocked, whole):
            optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
    for one, other in zip(mine, plain, strict=True):
        assert all(torch.equal(blocked.state[one][k], v) for k, v in whole.state[other].items())


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
