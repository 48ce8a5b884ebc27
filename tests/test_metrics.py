"""Metrics against their formulas, and the loss recovered by SAEs whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sae_core.activations import Activations, HarvestConfig, stream_activations
from sae_core.errors import UserError
from sae_core.kernels.codes import codes_where
from sae_core.metrics import LossRecovered, ReconstructionStats, evaluate, loss_recovered
from sae_core.sae import SAE, SAEConfig
from sae_core.text import rows_from_texts

HOOK_POINT = "layers.2.out"
TEXTS = (
    "Once upon a time there was a little girl named Lily. She loved to play with her red ball.",
    "Tom saw a big dog in the park.\n\nHe was very happy and ran to the dog. " * 3,
    "The end.",
    "Sara and Ben like the bird. They see the bird fly away. Sara says, bye bye, bird!",
)
# float32 forward passes over batches of different width
ROUNDING = 1e-4


def random_case(seed: int, n: int = 60, offset: float = 0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5)).astype(np.float32) + np.float32(offset)
    x_hat = x + rng.standard_normal((n, 5)).astype(np.float32) * np.float32(0.5)
    acts = np.maximum(rng.standard_normal((n, 8)) - 1, 0).astype(np.float32)
    acts[:, 3] = 0  # dead
    acts[1:, 4] = 0
    acts[0, 4] = 1  # alive by a single firing
    return tuple(torch.from_numpy(a) for a in (x, x_hat, acts))


def stats_of(x, x_hat, acts, cuts=()) -> list[ReconstructionStats]:
    """One statistic for each of the pieces that the cuts make."""
    pieces = []
    for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True):
        stats = ReconstructionStats(5, 8)
        stats.update(x[a:b], x_hat[a:b], codes_where(acts[a:b] > 0, acts[a:b]))
        pieces.append(stats)
    return pieces


@settings(max_examples=40)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(0, 60), max_size=4).map(sorted),
    st.sampled_from([0.0, 3.0, 1e4]),
    st.booleans(),
)
def test_merged_batches_give_the_direct_formula(seed, cuts, offset, from_the_right) -> None:
    x, x_hat, acts = random_case(seed, offset=offset)
    pieces = stats_of(x, x_hat, acts, cuts)
    if from_the_right:  # a merge (b merge c) instead of (a merge b) merge c
        pieces.reverse()
    for other in pieces[1:]:
        pieces[0].merge(other)
    got = pieces[0].compute()
    x64, dense = x.double().numpy(), acts.numpy()
    residual = ((x64 - x_hat.double().numpy()) ** 2).sum()
    assert got.fvu == pytest.approx(residual / ((x64 - x64.mean(0)) ** 2).sum(), rel=1e-9)
    assert got.l0 == pytest.approx((dense > 0).sum() / 60, rel=1e-12)
    np.testing.assert_allclose(got.freq, (dense > 0).mean(0), rtol=1e-12)
    np.testing.assert_array_equal(got.peak, dense.max(0))
    assert got.dead_fraction == pytest.approx((dense.max(0) == 0).mean())
    assert got.dead_fraction >= 1 / 8 and got.n_tokens == 60


def test_updating_is_merging() -> None:
    x, x_hat, acts = random_case(1, offset=50.0)
    streamed = ReconstructionStats(5, 8)
    for a in range(0, 60, 7):
        piece = slice(a, a + 7)
        streamed.update(x[piece], x_hat[piece], codes_where(acts[piece] > 0, acts[piece]))
    whole = stats_of(x, x_hat, acts)[0].compute()
    assert streamed.compute().fvu == pytest.approx(whole.fvu, rel=1e-9)
    assert streamed.compute().l0 == whole.l0


def test_the_mean_has_fvu_one_and_the_identity_zero() -> None:
    x, _, acts = random_case(2, offset=7.0)
    mean = x.double().mean(0).float().expand_as(x)
    assert stats_of(x, mean, acts)[0].compute().fvu == pytest.approx(1.0, rel=1e-5)
    assert stats_of(x, x, acts)[0].compute().fvu == 0.0


def test_what_is_not_defined_is_refused() -> None:
    x, x_hat, acts = random_case(3)
    with pytest.raises(UserError, match="at least one token"):
        ReconstructionStats(5, 8).compute()
    with pytest.raises(UserError, match="60 tokens that are all the same"):
        stats_of(torch.ones_like(x), x_hat, acts)[0].compute()
    with pytest.raises(UserError, match="finite reconstructions"):
        stats_of(x, x_hat * torch.inf, acts)[0].compute()
    with pytest.raises(UserError, match="finite activations"):
        stats_of(x * torch.nan, x_hat, acts)[0].compute()


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "relu"])
def test_evaluation_measures_both_fvus_and_is_free_of_batches(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(6, 12, kind=kind, k=3), generator=generator)
    with torch.no_grad():
        sae.threshold += 0.3
    x = torch.randn(50, 6, generator=generator) * 20 + 4
    whole = evaluate(sae.train(), [x])
    assert sae.training, "the mode is given back"
    sae.eval()
    x64, x_hat = x.double(), sae(x).x_hat.double()
    direct = (x64 - x_hat).square().sum() / (x64 - x64.mean(0)).square().sum()
    assert whole.fvu_raw == pytest.approx(float(direct), rel=1e-5)
    norm = x64.norm(dim=1, keepdim=True)
    u, u_hat = x64 / norm, x_hat / norm
    direct = (u - u_hat).square().sum() / (u - u.mean(0)).square().sum()
    assert whole.fvu == pytest.approx(float(direct), rel=1e-5)
    assert whole.fvu != pytest.approx(whole.fvu_raw, rel=1e-3)
    assert whole.l0 == pytest.approx(float((sae.encode(x) > 0).sum()) / 50)
    ids = torch.arange(50)
    parts = [
        Activations(x[a : a + 9], ids[a : a + 9], ids[a : a + 9].int()) for a in range(0, 50, 9)
    ]
    again = evaluate(sae, parts)
    assert again.fvu == pytest.approx(whole.fvu, rel=1e-6) and again.l0 == whole.l0


class Identity(SAE):
    """Reconstructs perfectly."""

    def reconstruct(self, x):
        return x.clone()


class Constant(SAE):
    """Reconstructs every token as the same vector."""

    def __init__(self, vector) -> None:
        super().__init__(SAEConfig(64, 8, kind="relu"))
        self.vector = vector
        self.seen = 0

    def reconstruct(self, x):
        self.seen += len(x)
        return self.vector.expand_as(x)


def loss(lm, sae, texts=TEXTS, **options) -> LossRecovered:
    config = HarvestConfig(**{"context_size": 64} | options)
    return loss_recovered(lm, sae, rows_from_texts(texts), HOOK_POINT, config)


@pytest.fixture(scope="module")
def random_sae() -> SAE:
    config = SAEConfig(64, 256, kind="topk", k=16)
    return SAE(config, generator=torch.Generator().manual_seed(0)).eval()


def test_the_identity_recovers_all_and_an_ablation_nothing(tiny_lm) -> None:
    perfect = loss(tiny_lm, Identity(SAEConfig(64, 8, kind="relu")))
    assert perfect.ce_zero > perfect.ce_clean + 1 and perfect.ce_mean > perfect.ce_clean + 1
    assert perfect.recovered_zero == pytest.approx(1.0, abs=1e-6)
    assert perfect.recovered_mean == pytest.approx(1.0, abs=1e-6)
    zero = loss(tiny_lm, Constant(torch.zeros(64)))
    assert zero.recovered_zero == pytest.approx(0.0, abs=1e-6)
    rows, config = rows_from_texts(TEXTS), HarvestConfig(context_size=64)
    x = torch.cat(
        [found[HOOK_POINT].x for found in stream_activations(tiny_lm, rows, [HOOK_POINT], config)]
    )
    sae = Constant(x.mean(0))
    mean = loss(tiny_lm, sae)
    assert mean.recovered_mean == pytest.approx(0.0, abs=ROUNDING)
    assert mean.recovered_zero > 0.05
    assert sae.seen == len(x), "exactly the kept tokens are replaced"


def test_padding_and_packing_change_none_of_the_four(tiny_lm, random_sae: SAE) -> None:
    whole = loss(tiny_lm, random_sae)
    assert whole.ce_clean < whole.ce_sae < whole.ce_zero
    for options in ({"batch_tokens": 64}, {"window_rows": 1}, {"batching": "pack"}):
        other = loss(tiny_lm, random_sae, **options)
        assert other.n_tokens == whole.n_tokens
        for name in ("ce_clean", "ce_sae", "ce_zero", "ce_mean"):
            assert getattr(other, name) == pytest.approx(getattr(whole, name), abs=ROUNDING)


@pytest.mark.parametrize("include", [False, True])
def test_the_losses_are_those_of_a_hand_written_hook(tiny_lm, include: bool) -> None:
    """Clean and zero-ablated loss of two texts, each alone in its own forward pass."""
    config = {"include_first": include, "include_special": include}
    got = loss(tiny_lm, Identity(SAEConfig(64, 8, kind="relu")), TEXTS[::3], **config)
    first = 0 if include else 1  # position 0 is the special token too

    def ablate(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.cat([hidden[:, :first], torch.zeros_like(hidden[:, first:])], dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def summed(text: str) -> tuple[float, int]:
        ids = torch.tensor([tiny_lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = tiny_lm.model(ids).logits[0, :-1].double()
        return float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")), ids.shape[1] - 1

    clean = [summed(text) for text in TEXTS[::3]]
    handle = tiny_lm.model.model.layers[2].register_forward_hook(ablate)
    try:
        zero = [summed(text) for text in TEXTS[::3]]
    finally:
        handle.remove()
    n = sum(count for _, count in clean)
    assert got.n_tokens == n
    assert got.ce_clean == pytest.approx(sum(value for value, _ in clean) / n, abs=ROUNDING)
    assert got.ce_zero == pytest.approx(sum(value for value, _ in zero) / n, abs=ROUNDING)


def test_the_model_is_as_before_even_after_an_error(tiny_lm) -> None:
    before = loss(tiny_lm, Identity(SAEConfig(64, 8, kind="relu"))).ce_clean
    block = tiny_lm.model.model.layers[2]
    # transformers keeps hooks of its own once any test has asked for hidden states
    hooks = len(block._forward_hooks), len(block._forward_pre_hooks)
    with pytest.raises(RuntimeError):
        loss(tiny_lm, Constant(torch.zeros(63)))
    assert loss(tiny_lm, Identity(SAEConfig(64, 8, kind="relu"))).ce_clean == before
    assert (len(block._forward_hooks), len(block._forward_pre_hooks)) == hooks


def test_a_given_mean_is_used_and_saves_the_first_pass(tiny_lm, random_sae: SAE) -> None:
    rows = rows_from_texts(TEXTS)
    once = loss_recovered(
        tiny_lm, random_sae, iter(rows), HOOK_POINT, HarvestConfig(), mean=torch.zeros(64)
    )
    assert once.ce_mean == once.ce_zero
    with pytest.raises(UserError, match="read twice"):
        loss_recovered(tiny_lm, random_sae, iter(rows), HOOK_POINT)
    with pytest.raises(UserError, match=r"d_in 64, got \[3\]"):
        loss_recovered(tiny_lm, random_sae, rows, HOOK_POINT, mean=torch.zeros(3))


def test_what_does_not_fit_is_refused(tiny_lm) -> None:
    narrow = SAE(SAEConfig(63, 8, kind="relu"))
    with pytest.raises(UserError, match="width d_in 63, but layers.2.out of .* has 64"):
        loss(tiny_lm, narrow)
    with pytest.raises(UserError, match="at least one token to replace"):
        loss(tiny_lm, Constant(torch.zeros(64)), ("",))
