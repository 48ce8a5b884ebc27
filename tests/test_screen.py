"""The 8-bit product proposes the active entries of float64; float32 gives their values."""

from types import SimpleNamespace

import pytest
import torch

from sae_core.errors import UserError
from sae_core.kernels import active, screen
from sae_core.sae import SAE, SAEConfig
from sae_core.state import TrainConfig
from sae_core.train import train

with_instructions = pytest.mark.skipif(
    not screen.serves(torch.ones(1, 1)), reason="needs numba, and products of 8-bit integers (VNNI)"
)


def problem(n: int, d_in: int, d_sae: int, seed: int = 0, rare: float = 0.02):
    """Tokens with a few wide dimensions, unit latents, biases at a quantile."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator)
    x[:, ::17] *= 5
    x /= x.norm(dim=1, keepdim=True)
    rows = torch.randn(d_sae, d_in, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    b = -torch.quantile(x @ rows.T, 1 - rare, dim=0)
    return x, rows.T, b


def exact(x, w, b):
    return x.double() @ w.double() + b.double()


def proposed(codes):
    return codes.with_values(torch.ones_like(codes.values)).to_dense() > 0


@with_instructions
@pytest.mark.parametrize(("n", "d_in", "d_sae"), [(700, 576, 900), (33, 65, 1031), (5, 3, 7)])
def test_active_entries_are_among_the_candidates(n, d_in, d_sae):
    x, w, b = problem(n, d_in, d_sae)
    y = exact(x, w, b)
    codes = screen.active_codes(x, w, b)
    missed = ((y > 0) & ~proposed(codes)).sum()
    assert missed <= (y > 0).sum() / 5000
    assert codes.col.shape[0] < 2 * (y > 0).sum() + n * d_sae / 100
    torch.testing.assert_close(codes.values.double(), y[codes.row, codes.col], rtol=0, atol=1e-5)
    place = codes.row * d_sae + codes.col
    assert (place.diff() > 0).all()  # rows, and columns within them, ascend
    assert torch.equal(codes.crow.diff(), torch.bincount(codes.row, minlength=n))


@with_instructions
def test_a_product_in_bfloat16_passes_over_more():
    x, w, b = problem(512, 576, 1024)
    y = exact(x, w, b) > 0
    half = active.active_codes(x, w, b, dtype=torch.bfloat16)
    missed = [int((y & ~proposed(codes)).sum()) for codes in (screen.active_codes(x, w, b), half)]
    assert missed[0] < missed[1] / 10


@with_instructions
@pytest.mark.parametrize("bias", [-1.0, -0.02, 0.0, 0.02, 1.0, 30.0])
def test_biases_of_any_size(bias):
    x, w, _ = problem(256, 40, 300)
    b = torch.full((300,), bias)
    y = exact(x, w, b)
    codes = screen.active_codes(x, w, b)
    assert not ((y > 2e-3) & ~proposed(codes)).any()
    if bias == -1:
        assert codes.col.shape[0] == 0  # |w'x| <= 1


@with_instructions
def test_tokens_of_very_different_size_and_latents_along_an_axis():
    x, w, b = problem(256, 40, 300)
    x[0] *= 3000
    x[1] = 0
    w = w.clone().T.contiguous()
    w[0] = 0
    w[1] = torch.eye(40)[5]
    w = w.T
    y = exact(x, w, b)
    codes = screen.active_codes(x, w, b)
    assert ((y > 0) & ~proposed(codes)).sum() <= (y > 0).sum() / 2000


@with_instructions
def test_a_threshold_of_each_latent():
    x, w, b = problem(256, 64, 200)
    threshold = torch.linspace(0, 0.1, 200)
    over = screen.active_codes(x, w, b, threshold)
    shifted = screen.active_codes(x, w, b - threshold)
    assert torch.equal(over.row, shifted.row) and torch.equal(over.col, shifted.col)
    y = exact(x, w, b)[over.row, over.col]
    torch.testing.assert_close(over.values.double(), y, rtol=0, atol=1e-5)


@with_instructions
def test_blocks_change_nothing(monkeypatch):
    x, w, b = problem(128, 64, 1000)
    whole = screen.active_codes(x, w, b)
    monkeypatch.setattr(screen, "BLOCK_BYTES", 128 * 300)
    monkeypatch.setattr(screen, "ROWS", 70)
    parts = screen.active_codes(x, w, b)
    assert all(torch.equal(one, other) for one, other in zip(whole[:4], parts[:4], strict=True))


@with_instructions
def test_what_is_served():
    assert screen.serves(torch.ones(2, 3))
    assert not screen.serves(torch.ones(0, 3))
    assert not screen.serves(torch.ones(1, screen.MOST_COLUMNS + 1))


@with_instructions
def test_the_widest_rows_have_room_for_their_margin():
    flat = torch.ones(2, screen.MOST_COLUMNS)
    p = screen._latents(flat, torch.zeros(2), 1.0)
    q, _ = screen._tokens(flat)
    assert p[0, -2] > 128 + 100 and q[0, -1] > 100  # and below 256 and 128: no wrap-around
    codes = screen.active_codes(flat, flat.T, torch.zeros(2))
    assert codes.col.tolist() == [0, 1, 0, 1]


@with_instructions
def test_a_product_that_saturates_is_found_out(monkeypatch):
    real = screen._positive_part
    assert screen.available.__wrapped__()
    monkeypatch.setattr(screen, "_positive_part", lambda p, q: real(p.clamp_max(200), q))
    assert not screen.available.__wrapped__()


def test_a_torch_without_the_product_is_no_error(monkeypatch):
    def absent(*_):
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    monkeypatch.setattr(screen, "_packed", absent)
    assert not screen.available.__wrapped__()


def _trained(precision: str, kind: str = "gba") -> tuple[SAE, float]:
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(96, 32, generator=generator)
    acts = torch.rand(4096, 96, generator=generator) * (
        torch.rand(4096, 96, generator=generator) < 0.05
    )
    x = acts @ directions
    config = TrainConfig(steps=60, batch_size=256, precision=precision)
    sae = SAE(SAEConfig(32, 128, kind=kind, k=5), generator=torch.Generator().manual_seed(0))
    records = list(train(sae, (x[i % 16 * 256 :][:256] for i in range(80)), config))
    return sae, records[-1].fvu


@pytest.mark.parametrize("kind", ["gba", "jumprelu", "relu"])
def test_training_is_that_of_float32(kind):
    (_, full), (_, small) = _trained("float32", kind), _trained("int8", kind)
    assert small == pytest.approx(full, rel=0.05)


@with_instructions
def test_training_does_search_in_8_bits():
    (one, _), (other, _) = _trained("int8"), _trained("bfloat16")
    assert not torch.equal(one.W_dec, other.W_dec)


def test_without_the_instructions_the_product_is_in_bfloat16(monkeypatch):
    monkeypatch.setattr(screen, "available", lambda: False)
    (one, _), (other, _) = _trained("int8"), _trained("bfloat16")
    assert torch.equal(one.W_dec, other.W_dec)


def test_topk_ranks_in_bfloat16():
    (one, _), (other, _) = _trained("int8", "topk"), _trained("bfloat16", "topk")
    assert torch.equal(one.W_dec, other.W_dec)


def test_an_unknown_precision_is_refused():
    given = SimpleNamespace(**vars(TrainConfig(steps=1)) | {"precision": "float16"})
    with pytest.raises(UserError, match=r"precision must be one of float32, .*, got 'float16'\."):
        TrainConfig.__post_init__(given)  # the tests' type checker forestalls the constructor
