"""Monet: against sums over all experts, in transformers' conventions, from checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.errors import UserError
from sae_core.models import load_model
from sae_core.monet.experts import HorizontalExperts, VerticalExperts
from sae_core.monet.mixing import Factored, Kept, Pairs, Without
from sae_core.monet.router import (
    FLOOR,
    MonetRouter,
    Seen,
    ambiguity,
    cut_softmax,
    mean_use,
    uniformity,
)
from tests.tiny_monet import SHAPE, WORDS, save_monet, tiny_monet

T, H, N, M, D = 5, 3, 8, 4, 6
EXACT = 1e-12  # float64, sums of a few hundred terms of size 1
KINDS = ("horizontal", "vertical")


def gates(seed: int = 0, t: int = T) -> tuple[Tensor, Tensor]:
    """Random softmax gates with zeros, float64."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        logits = torch.randn(t, H, N, generator=g, dtype=torch.float64)
        made.append(logits.masked_fill(logits < 0, -torch.inf).softmax(-1))
    return made[0], made[1]


def layer(kind: str, seed: int = 0) -> HorizontalExperts | VerticalExperts:
    torch.manual_seed(seed)
    made = {"horizontal": HorizontalExperts, "vertical": VerticalExperts}[kind](D, N, M).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def brute_force(moe: Any, x: Tensor, weights: Tensor) -> Tensor:
    """sum_ij weights_ij E_ij(x), expert by expert, from the definition of E_ij."""
    out = torch.zeros_like(x)
    for t, i, j in np.ndindex(len(x), N, N):
        out[t] += weights[t, i, j] * one_expert(moe, x[t], i, j)
    return out


def one_expert(moe: Any, x: Tensor, i: int, j: int) -> Tensor:
    if isinstance(moe, HorizontalExperts):
        rows, cols = slice(i * M, i * M + M), slice(j * M, j * M + M)
        hidden = (moe.u.weight[rows] @ x + moe.u.bias[rows]).relu() ** 2
        return moe.v.weight[:, cols] @ hidden + moe.b[j]
    a, b = slice(i * M // 2, (i + 1) * M // 2), slice(j * M // 2, (j + 1) * M // 2)
    p = (moe.u1.weight[a] @ x + moe.u1.bias[a]).relu() ** 2
    r = (moe.u2.weight[b] @ x + moe.u2.bias[b]).relu() ** 2
    top = moe.v11.weight[:, a] @ p + moe.v12.weight[:, a] @ r + moe.b1[i]
    return torch.cat((top, moe.v21.weight[:, b] @ p + moe.v22.weight[:, b] @ r + moe.b2[j]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_factorised_sum_is_the_sum_over_all_experts(kind: str) -> None:
    moe, (g1, g2) = layer(kind), gates()
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = brute_force(moe, x, g1.mT @ g2)
    assert (moe(x, g1, g2) - want).abs().max() < EXACT * want.abs().max()
    batched = moe(x.view(1, T, D), g1[None], g2[None])
    assert torch.equal(batched[0], moe(x, g1, g2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_sum_leaves_out_exactly_the_deleted_experts(kind: str) -> None:
    moe, (g1, g2) = layer(kind), gates(2)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    keep = torch.from_numpy(np.random.default_rng(4).random((N, N)) < 0.6)
    want = brute_force(moe, x, (g1.mT @ g2) * keep)
    removed = torch.from_numpy(np.flatnonzero(~keep.numpy()))
    dense = moe.mixed(x, Kept.of((g1, g2), keep))
    pairs = Pairs.of((g1, g2), removed)
    sparse = moe.mixed(x, Without(Factored(g1, g2), pairs))
    apart = moe.mixed(x, Factored(g1, g2)) - moe.mixed(x, pairs)
    for found in (dense, sparse, apart):
        assert (found - want).abs().max() < EXACT * want.abs().max()
    assert (moe(x, g1, g2) - want).abs().max() > 0.01  # control: the mask does something


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_layer_and_gates(kind: str) -> None:
    moe, (g1, g2) = layer(kind), gates(5, t=2)
    x = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    inputs = [v.requires_grad_() for v in (x, g1.softmax(-1), g2.softmax(-1))]
    assert torch.autograd.gradcheck(lambda *a: moe(*a), inputs)


def test_the_cut_keeps_what_passes_the_quantile_and_always_the_best() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[0.0, 0.1, 0.2, 0.3]]])
    got = cut_softmax(logits, torch.zeros(1), torch.ones(1), 1.5)
    e = np.exp([2.0, 3.0])
    assert np.allclose(got[0, 0], [0, 0, *(e / e.sum())])  # 2 and 3 pass 1.5
    assert np.allclose(got[1, 0], [0, 0, 0, 1])  # none passes: the best stays
    scaled = cut_softmax(logits, torch.tensor([1.0]), torch.tensor([4.0]), 0.4)
    e = np.exp([2.0, 3.0])
    assert np.allclose(scaled[0, 0], [0, 0, *(e / e.sum())])  # (2 - 1) / 2 = 0.5 passes, 0 does not


def test_about_k_halves_pass_in_training_and_running_moments_follow() -> None:
    torch.manual_seed(0)
    router = MonetRouter(32, 4, 128, 16)
    x = torch.randn(400, 32)
    g1, _ = router(x)
    n_active = (g1 > 0).sum(-1).float().mean()
    assert 13 < n_active < 19
    assert torch.allclose(g1.sum(-1), torch.ones(400, 4))
    for _ in range(60):
        router(x)
    logits = router.w1(x).unflatten(-1, (4, 128))
    assert torch.allclose(router.norm1.running_mean, logits.mean((0, 2)), atol=1e-2)
    assert torch.allclose(router.norm1.running_var, logits.var((0, 2), correction=0), rtol=0.02)
    router.eval()
    alone, together = router(x[:1])[0], router(x)[0][:1]
    assert torch.allclose(alone, together, atol=1e-6)  # the batch makes no difference then


def test_the_losses_by_hand() -> None:
    even, one = torch.full((12, 1, 4), 0.25), torch.eye(4)[None].expand(3, 4, 4).reshape(12, 1, 4)
    assert uniformity(mean_use(even), mean_use(even)) == pytest.approx(np.log(4))
    assert uniformity(mean_use(one), mean_use(even)) == pytest.approx(np.log(4))  # a quarter each
    assert ambiguity((even, even)) == pytest.approx(0.75)
    assert ambiguity((one, even)) == pytest.approx(0.375)
    first = torch.tensor([[1.0, 0.0]])
    assert uniformity(first, first) == pytest.approx(-np.log(FLOOR) / 2)  # log 0 is floored
    assert uniformity(first, mean_use(even[..., :2] * 2)) == pytest.approx(
        (-np.log(FLOOR) / 2 + np.log(2)) / 2
    )


def test_a_half_that_nobody_uses_gets_a_gradient_from_its_logits_alone() -> None:
    torch.manual_seed(0)
    router = MonetRouter(16, 2, 8, 2)
    x = torch.randn(64, 16) + 1
    router.w1.weight.data[3] = -1.0  # far below the cut for every token
    seen = Seen()
    g1, g2 = router(x, seen)
    assert not g1[:, 0, 3].any()
    for use, has_gradient in (([mean_use(g1), mean_use(g2)], False), (seen.use, True)):
        router.zero_grad()
        uniformity(use[0], use[1]).backward(retain_graph=True)
        assert router.w1.weight.grad is not None
        assert bool(router.w1.weight.grad[3].any()) == has_gradient


def ids(seed: int = 0, shape: tuple[int, int] = (2, 12)) -> Tensor:
    return torch.randint(0, len(WORDS), shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_the_cache_is_generation_without(kind: str) -> None:
    model, prompt = tiny_monet(kind), ids()
    common = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0,
              "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    with_cache = model.generate(prompt, use_cache=True, **common)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **common))
    model.model.layers[0].router.w1.weight.data.neg_()  # control: routing matters
    assert not torch.equal(with_cache, model.generate(prompt, use_cache=False, **common))


@pytest.mark.parametrize("asked", [None, {"use_reentrant": True}])
def test_checkpointing_changes_neither_gradients_nor_running_moments(asked: Any) -> None:
    plain, saving = tiny_monet(seed=3), tiny_monet(seed=3)
    enable = getattr(saving, "activation_checkpointing_enable", None) or (
        saving.gradient_checkpointing_enable
    )
    enable(asked)
    for model in (plain, saving):
        model.train()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name
    routers = [model.model.layers[2].router for model in (plain, saving)]
    assert torch.equal(routers[0].norm2.running_var, routers[1].norm2.running_var)
    assert routers[1].norm2.num_batches_tracked == 31


def test_router_probabilities_stand_where_routers_are() -> None:
    model = tiny_monet()
    output = model(input_ids=ids(), output_router_probs=True)
    has = [entry is not None for entry in output.router_probs]
    assert has == [True, False, True, False]
    g1, g2 = output.router_probs[2]
    assert g1.shape == g2.shape == (2, 12, SHAPE["moe_heads"], SHAPE["moe_experts"])
    assert model(input_ids=ids()).router_probs is None
    assert isinstance(model(input_ids=ids(), return_dict=False), tuple)


def test_the_loss_in_training_has_the_auxiliary_terms() -> None:
    model = tiny_monet(moe_aux=0.5)
    model.train()
    output = model(input_ids=ids(), labels=ids())
    seen = [model(input_ids=ids(), output_router_probs=True).router_probs[i] for i in (0, 2)]
    want = np.mean([
        float((uniformity(mean_use(g[0]), mean_use(g[1])) + ambiguity(g)).detach()) for g in seen
    ])  # fmt: skip
    assert float(output.aux_loss.detach()) == pytest.approx(want, rel=1e-5)
    model.config.moe_uniformity = "logits"
    assert float(model(input_ids=ids(), labels=ids()).aux_loss.detach()) < want
    model.config.moe_aux = 0.0
    plain = model(input_ids=ids(), labels=ids()).loss
    assert float((output.loss - plain).detach()) == pytest.approx(0.5 * want, rel=1e-4)
    assert model.eval()(input_ids=ids(), labels=ids()).aux_loss is None


# ---- checkpoints ----


def published(folder: Path, kind: str) -> tuple[Any, Path]:
    """A folder as the published ones: bfloat16, auto_map to remote code, rope_theta on top."""
    model = tiny_monet(kind)
    save_monet(folder, model)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "modeling_monet.MonetForCausalLM"},
        "rope_theta": 10000.0, "rope_scaling": None, "transformers_version": "4.44.2",
    }  # fmt: skip
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    return model, folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_folder_loads_without_its_code(kind: str, tmp_path: Path) -> None:
    model, folder = published(tmp_path / "m", kind)
    names = load_file(folder / "model.safetensors")
    first = "model.layers.0."
    own = {"horizontal": ("u", "v", "b"), "vertical": ("u1", "u2", "v11", "v12", "v21", "v22")}
    for name in own[kind]:
        assert any(key.startswith(f"{first}moe.{name}") for key in names), name
    assert {f"{first}router.{x}" for x in ("w1.weight", "norm1.running_var")} <= set(names)
    assert not any(".1.router" in name for name in names)
    lm = load_model(str(folder))
    assert torch.equal(lm.model(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_missing_and_extra_tensors_are_refused(tmp_path: Path) -> None:
    _, folder = published(tmp_path / "m", "vertical")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.1.moe.v": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors that no Monet .* model\.layers\.1\.moe\.v"):
        load_model(str(folder))
    del tensors["model.layers.2.router.w1.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are absent, .*layers\.2\.router\.w1"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"moe_topk": 8}, "moe_topk between 1 and moe_experts - 1 = 7, got 8"),
        ({"moe_dim": 3}, "even moe_dim, got 3"),
        ({"moe_uniformity": "all"}, "moe_uniformity of gates, logits, got 'all'"),
        ({"hidden_act": "gelu"}, "hidden_act 'relu2', got 'gelu'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_monet(**shape)
    with pytest.raises(UserError, match="vertical, got 'diagonal'|horizontal, vertical"):
        tiny_monet("diagonal")
