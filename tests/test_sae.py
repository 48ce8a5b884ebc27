"""The SAE's codes, reconstruction, saving; nonlinearities by hand-worked cases."""

import json

import pytest
import torch

from sae_core import nonlinearity
from sae_core.errors import CorruptFileError, UserError
from sae_core.sae import SAE, SAEConfig, load_sae, save_sae

KINDS = ["gba", "topk", "batch_topk", "jumprelu", "relu"]
FLOAT32 = 1e-5  # sums of at most 64 float32 products in another order


def make(kind: str, **more) -> SAE:
    sae = SAE(SAEConfig(12, 40, kind=kind, k=5, **more), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    sae.b_enc.data = -0.3 * torch.rand(40, generator=generator)
    sae.b_dec.data = 0.1 * torch.randn(12, generator=generator)
    sae.scale.data = 1 + torch.rand(40, generator=generator) if kind == "gba" else sae.scale.data
    sae.threshold.data.fill_(0.2)
    return sae.eval()


def tokens(n: int = 30, seed: int = 2) -> torch.Tensor:
    return 7 * torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_follow_the_equation_of_the_module(kind):
    sae, x = make(kind), tokens()
    u = x / x.norm(dim=1, keepdim=True)
    pre = (u - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = {
        "relu": pre.relu(),
        "gba": (pre - sae.b_enc) * (pre > 0),
        "jumprelu": pre * (pre > sae.threshold),
        "batch_topk": pre * (pre > sae.threshold),
        "topk": pre * (pre >= pre.topk(5).values[:, -1:]) * (pre > 0),
    }[kind]
    x_hat = x.norm(dim=1, keepdim=True) * ((acts * sae.scale) @ sae.W_dec + sae.b_dec)
    out = sae(x)
    torch.testing.assert_close(out.acts, acts, rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(out.x_hat, x_hat, rtol=FLOAT32, atol=1e-4)
    torch.testing.assert_close(sae.reconstruct(x), out.x_hat, rtol=FLOAT32, atol=1e-4)
    torch.testing.assert_close(sae.encode_sparse(x).to_dense(), sae.encode(x))


def test_the_gate_jumprelu_moves_when_a_latent_fires_but_not_its_value():
    x = tokens()
    jump, relu = make("gba"), make("gba", gate="relu")
    a, b = jump.encode(x), relu.encode(x)
    assert torch.equal(a > 0, b > 0) and (a > 0).any()
    torch.testing.assert_close((a - b)[a > 0], -jump.b_enc.expand_as(a)[a > 0])


def test_tied_weights_are_one_tensor_and_scale_sets_the_magnitude():
    sae = SAE(SAEConfig(12, 40, k=5, tied=True))
    assert sae.W_dec.data_ptr() == sae.W_enc.data_ptr() and "W_dec" not in sae.tensors()
    with pytest.raises(UserError, match="tied=True is defined for kind='gba', got kind='topk'"):
        SAEConfig(12, 40, kind="topk", k=5, tied=True)


def test_a_code_does_not_depend_on_its_batch():
    for kind in KINDS:
        sae, x = make(kind), tokens()
        torch.testing.assert_close(sae.encode(x)[:1], sae.encode(x[:1]), rtol=1e-4, atol=1e-5)


def test_batch_topk_ranks_the_batch_in_training_only():
    pre = torch.tensor([[9.0, 8.0, 7.0, 1.0], [2.0, 0.5, -1.0, 0.1]])
    codes = nonlinearity.batch_topk(pre, 2)
    assert codes.to_dense().tolist() == [[9.0, 8.0, 7.0, 0.0], [2.0, 0.0, 0.0, 0.0]]
    assert nonlinearity.topk(pre, 2).to_dense().tolist() == [[9.0, 8.0, 0, 0], [2.0, 0.5, 0, 0]]


def test_topk_never_activates_a_negative_pre_activation():
    pre = torch.tensor([[-1.0, -2.0, 3.0]])
    assert nonlinearity.topk(pre, 2).col.tolist() == [2]
    assert nonlinearity.batch_topk(pre, 3).col.tolist() == [2]


def test_jump_has_the_gradients_of_the_paper():
    y = torch.tensor([1.0, 0.52, 0.48, 0.1], requires_grad=True)
    threshold = torch.full((4,), 0.5, requires_grad=True)
    value, on = nonlinearity.jump_straight_through(y, threshold, 0.1)
    assert value.tolist() == pytest.approx([1.0, 0.52, 0.0, 0.0]) and on.tolist() == [1, 1, 0, 0]
    (value.sum() + 3 * on.sum()).backward()
    assert y.grad is not None and threshold.grad is not None
    assert y.grad.tolist() == [1, 1, 0, 0]
    # -(threshold + 3) / bandwidth inside the window of 0.05 on both sides, else 0
    assert threshold.grad.tolist() == pytest.approx([0, -35, -35, 0])


def test_width_and_k_are_refused_with_both_values():
    with pytest.raises(UserError, match=r"d_in=12\], got shape \[3, 13\]"):
        make("gba").encode(torch.zeros(3, 13))
    with pytest.raises(UserError, match="between 1 and d_sae=40, or be 0 for the default, got 41"):
        SAEConfig(12, 40, kind="topk", k=41)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_sae(kind, tmp_path):
    sae, x = make(kind), tokens()
    save_sae(tmp_path / "sae", sae, {"hook_point": "layers.1.out"})
    again, extra = load_sae(tmp_path / "sae")
    assert extra == {"hook_point": "layers.1.out"}
    assert again.hash() == sae.hash()
    assert torch.equal(again.encode(x), sae.encode(x))
    again.b_enc.data[0] += 1
    assert again.hash() != sae.hash()


def test_a_damaged_sae_is_named(tmp_path):
    save_sae(tmp_path / "sae", make("gba"))
    file = tmp_path / "sae" / "sae.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match="sae.safetensors"):
        load_sae(tmp_path / "sae")


def test_an_unknown_config_key_is_refused(tmp_path):
    from sae_core.store import atomic_folder

    save_sae(tmp_path / "sae", make("gba"))
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    config["sae"]["colour"] = "blue"
    with atomic_folder(tmp_path / "new") as tmp:
        (tmp / "config.json").write_text(json.dumps(config))
        (tmp / "sae.safetensors").write_bytes((tmp_path / "sae" / "sae.safetensors").read_bytes())
    with pytest.raises(CorruptFileError, match="colour"):
        load_sae(tmp_path / "new")


@pytest.mark.parametrize("k", [1, 3, 20, 40])
def test_batch_topk_keeps_exactly_the_largest_of_the_batch(k):
    pre = torch.randn(50, 40, generator=torch.Generator().manual_seed(k)).abs()
    codes = nonlinearity.batch_topk(pre, k)
    expected = pre.flatten().sort(descending=True).values[: 50 * k]
    assert torch.equal(codes.values.sort(descending=True).values, expected)
