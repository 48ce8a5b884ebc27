"""Training: every kind learns, one seed one result, resumed equals unbroken, ranks agree."""

import dataclasses
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.fuzz_corpus import reseal
from sae_core import loss, start
from sae_core.buffer import batches
from sae_core.checkpoint import load_checkpoint, save_checkpoint
from sae_core.errors import CorruptFileError, UserError
from sae_core.gba import GBAConfig, paper_main
from sae_core.kernels import autograd
from sae_core.kernels.codes import Codes, codes_where
from sae_core.loss import SparsityConfig
from sae_core.parallel import ALONE
from sae_core.sae import SAE, SAEConfig
from sae_core.state import learning_rate
from sae_core.step import gradient_step
from sae_core.train import TrainConfig, TrainState, _peek, _Window, train

KINDS = ["gba", "topk", "batch_topk", "jumprelu", "relu"]
CONFIG = TrainConfig(
    steps=60, batch_size=128, lr=5e-3, init_tokens=512, log_every=10,
    gba=GBAConfig(4, 0.3, 0.05, calibrate_tokens=1024),
    sparsity=SparsityConfig(dead_after_tokens=1280),
)  # fmt: skip


def planted(n: int = 6000, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(24, 16, generator=torch.Generator().manual_seed(99))
    on = torch.rand(n, 24, generator=generator) < 0.1
    return on.float() @ v + 0.05 * torch.randn(n, 16, generator=generator) + 0.3


def new(kind: str, seed: int = 0, **more) -> SAE:
    config = SAEConfig(16, 48, kind=kind, k=6, **more)
    return SAE(config, generator=torch.Generator().manual_seed(seed))


def run(sae: SAE, config: TrainConfig = CONFIG, x: torch.Tensor | None = None):
    x = planted() if x is None else x
    return list(train(sae, batches(x, config.batch_size, seed=config.seed), config))


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(v, b.tensors()[k]) for k, v in a.tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_repeats(kind):
    sae, twin, other = new(kind), new(kind), new(kind, seed=1)
    records = run(sae)
    assert [r.step for r in records] == [10, 20, 30, 40, 50, 60]
    assert records[-1].tokens == 60 * 128
    assert records[-1].fvu < 0.6 * records[0].fvu
    assert records[-1].l0 < 20
    assert run(twin) == records and same(sae, twin)
    run(other)
    assert not same(sae, other)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_compiler_alone(kind):
    code = (
        "import sys, torch\nfrom sae_core.sae import SAE, SAEConfig\n"
        "from sae_core.train import TrainConfig, train\n"
        f"sae = SAE(SAEConfig(8, 32, kind={kind!r}, k=4))\n"
        "x = torch.randn(512, 8)\n"
        "config = TrainConfig(steps=4, batch_size=64, init_tokens=64)\n"
        "steps = train(sae, iter(x.split(64)), config)\n"
        "assert list(steps)[-1].step == 4\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_record_is_exact_however_far_the_tokens_lie_from_zero():
    generator = torch.Generator().manual_seed(0)
    parts = [1000 + torch.randn(256, 16, generator=generator) for _ in range(4)]
    window = _Window()
    codes = codes_where(torch.ones(256, 3, dtype=torch.bool), torch.ones(256, 3))
    for u in parts:
        window.add(u, u + 0.5, codes, ALONE)
    u = torch.cat(parts).double()
    expected = 0.25 * 16 * len(u) / float((u - u.mean(0)).square().sum())
    record = window.record(TrainState(tokens_since=torch.zeros(3)), 1, 0.0)
    assert record.fvu == pytest.approx(expected, rel=1e-4) and record.l0 == 3


def test_the_head_of_a_stream_is_let_go():
    made = [torch.full((4, 2), float(i)) for i in range(5)]
    gone = [weakref.ref(t) for t in made]
    head, again = _peek((made.pop(0) for _ in range(5)), 9, ALONE)
    assert len(head) == 9
    first = next(again)
    assert first[0, 0] == 0
    del first
    next(again)
    assert gone[0]() is None and gone[2]() is not None
    assert [float(t[0, 0]) for t in again] == [2, 3, 4]


@pytest.mark.parametrize("kind", ["gba", "topk", "relu"])
def test_bfloat16_selection_keeps_exact_values(kind):
    sae = new(kind)
    records = run(sae, dataclasses.replace(CONFIG, precision="bfloat16"))
    plain = run(new(kind))
    assert records != plain  # the product did change
    assert records[-1].fvu == pytest.approx(plain[-1].fvu, abs=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gate", ["jumprelu", "relu"])
def test_gba_in_all_its_forms(tied, gate):
    sae = new("gba", tied=tied, gate=gate)
    records = run(sae)
    assert records[-1].fvu < 0.6 * records[0].fvu
    norms = sae.W_enc.norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_published_start_is_zero_and_the_quantile_start_is_sparse():
    zero = run(new("gba"), dataclasses.replace(CONFIG, log_every=1, gba=paper_main()))
    quantile = run(new("gba"), dataclasses.replace(CONFIG, log_every=1))
    assert zero[0].l0 > 18  # a random direction fires on half of the tokens: 24 of 48
    assert quantile[0].l0 < 0.5 * zero[0].l0


def test_the_l1_weight_finds_the_asked_l0_and_follows_the_sign():
    long = dataclasses.replace(CONFIG, steps=600)
    assert run(new("relu"), long)[-1].l0 == pytest.approx(6, rel=0.35)
    assert (
        loss.adapt_l1(1.0, 12.0, 6, long.sparsity) > 1 > loss.adapt_l1(1.0, 3.0, 6, long.sparsity)
    )
    assert loss.adapt_l1(1.0, 12.0, 6, SparsityConfig(l1_rate=0.0)) == 1.0


def autoencoded(sae: SAE, u: Tensor, codes: Codes) -> tuple[Codes, Tensor]:
    """Differentiable activations and reconstruction on a given active set, as a step makes them."""
    codes = sae.gate(autograd.encode(u, sae.W_enc, sae.b_enc, sae.b_dec, codes))
    return codes, sae.decode_sparse(codes)


def test_auxk_reaches_dead_latents_and_only_them():
    sae = new("topk")
    sae.b_enc.data[24:] = -10.0  # dead for any input
    u, _ = sae.normalise(planted(64))
    pre = sae.pre_activations(u)
    dead = torch.arange(48) >= 24
    codes, u_hat = autoencoded(sae, u, sae.select(pre))
    value = loss.auxk_loss(sae, u, u_hat, pre + 10.0 * dead, dead, 4)
    value.backward()
    assert sae._encoder.grad is not None
    assert (sae._encoder.grad[:24] == 0).all() and (sae._encoder.grad[24:] != 0).any()
    assert sae.b_dec.grad is not None  # through the encoder's centring, not through e_hat


def test_sparse_gradients_equal_those_of_a_dense_sae():
    sae, x = new("topk"), planted(32)
    u, _ = sae.normalise(x)
    codes, u_hat = autoencoded(sae, u, sae.select(sae.pre_activations(u)))
    loss.reconstruction_loss(u_hat, u, 1.0).backward()
    leaves = {k: getattr(sae, k).detach().clone().requires_grad_() for k in ("W_enc", "b_dec")}
    w_dec = sae.W_dec.detach().clone().requires_grad_()
    pre = (u - leaves["b_dec"]) @ leaves["W_enc"] + sae.b_enc.detach()
    acts = pre * (codes_where(pre > -9, pre).with_values(pre.flatten()).to_dense() != 0)
    mask = codes.with_values(torch.ones_like(codes.values)).to_dense()
    dense = (acts * mask) @ w_dec + leaves["b_dec"]
    ((dense - u).square().sum() / len(u)).backward()
    assert sae._encoder.grad is not None
    pairs = (
        (sae._encoder.grad.T, leaves["W_enc"]), (sae.b_dec.grad, leaves["b_dec"]),
        (sae._decoder.grad, w_dec),
    )  # fmt: skip
    for found, leaf in pairs:
        torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-6)


def test_learning_rate_rises_stays_and_falls():
    config = dataclasses.replace(CONFIG, steps=100, warmup_frac=0.1, decay_frac=0.2)
    rates = [learning_rate(step, 1.0, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == rates[79]
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [10, 30])
def test_a_resumed_run_equals_an_unbroken_one_bit_by_bit(kind, stop, tmp_path):
    x, whole = planted(), new(kind)
    records = run(whole)
    half, state = new(kind), TrainState()
    for record in train(half, batches(x, 128, seed=0), CONFIG, state):
        if record.step == stop:
            save_checkpoint(tmp_path, half, state, CONFIG)
            break
    loaded = load_checkpoint(tmp_path, CONFIG)
    assert loaded is not None
    sae, state = loaded
    rest = list(train(sae, batches(x, 128, seed=0, start_step=state.step), CONFIG, state))
    assert rest == [r for r in records if r.step > stop]
    assert same(sae, whole)


def test_moments_of_what_is_no_parameter_are_refused(tmp_path):
    sae, state = new("gba"), TrainState()
    next(train(sae, batches(planted(), 128, seed=0), CONFIG, state))
    save_checkpoint(tmp_path, sae, state, CONFIG)
    (folder,) = tmp_path.glob("step-*")
    tensors = load_file(folder / "state.safetensors")
    assert "adam.step._encoder" in tensors
    renamed = {name.replace("._encoder", ".W_enc"): t for name, t in tensors.items()}
    save_file(renamed, folder / "state.safetensors")
    reseal(tmp_path)
    with pytest.raises(CorruptFileError, match=r"expected a checkpoint, .*moments of \['W_enc'\]"):
        load_checkpoint(tmp_path, CONFIG)


def test_a_damaged_checkpoint_falls_back_to_the_older_and_is_named(tmp_path, caplog):
    sae, state = new("gba"), TrainState()
    for _ in train(sae, batches(planted(), 128, seed=0), CONFIG, state):
        save_checkpoint(tmp_path, sae, state, CONFIG)
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["step-00000050", "step-00000060"]
    file = tmp_path / "step-00000060" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    loaded = load_checkpoint(tmp_path, CONFIG)
    assert loaded is not None and loaded[1].step == 50
    assert "step-00000060" in caplog.text and "state.safetensors" in caplog.text
    shutil.rmtree(tmp_path / "step-00000050")
    with pytest.raises(CorruptFileError, match="state.safetensors"):
        load_checkpoint(tmp_path, CONFIG)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    assert load_checkpoint(tmp_path / "none", CONFIG) is None
    sae, state = new("gba"), TrainState()
    next(iter(train(sae, batches(planted(), 128, seed=0), CONFIG, state)))
    save_checkpoint(tmp_path, sae, state, CONFIG)
    with pytest.raises(UserError, match=r"lr=0\.005, this run asks for 0\.1"):
        load_checkpoint(tmp_path, dataclasses.replace(CONFIG, lr=0.1))


def test_bad_streams_are_refused():
    with pytest.raises(UserError, match="empty stream"):
        list(train(new("gba"), [], CONFIG))
    with pytest.raises(UserError, match="at least one token, got an empty one"):
        list(train(new("gba"), [planted(128), planted(128)[:0]], CONFIG))
    with pytest.raises(UserError, match="batches for 60 steps, got 2"):
        list(train(new("gba"), [planted(128), planted(128)], CONFIG))
    with pytest.raises(UserError, match=r"d_in=16\], got shape \[128, 17\]"):
        list(train(new("gba"), [torch.zeros(128, 17)], CONFIG))


def _started(sae: SAE, x: torch.Tensor):
    from sae_core.start import start

    gba = dataclasses.replace(CONFIG.gba, calibrate_tokens=0)
    config = dataclasses.replace(CONFIG, steps=20, gba=gba)
    return start(sae, x[:512], config), config


def test_the_gradient_step_never_touches_the_biases_of_gba():
    sae, x = new("gba"), planted(512)
    state, config = _started(sae, x)
    before, weights = sae.b_enc.clone(), sae.W_enc.clone()
    gradient_step(sae, sae.normalise(x)[0], state, config, 1e-2)
    assert torch.equal(before, sae.b_enc) and not torch.equal(weights, sae.W_enc)


def hardly_varying(n: int = 60_000, spread: float = 0.005) -> torch.Tensor:
    """Tokens that are almost all mean, as behind a massive dimension."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=1)
    amount = torch.rand(n, 128, generator=generator)
    amount *= torch.rand(n, 128, generator=generator) < 0.03
    return torch.eye(64)[0] + spread * (amount @ directions)


@pytest.mark.parametrize(("reference", "learns"), [(start.SPREAD, True), (1e-9, False)])
def test_the_offsets_learn_slowly_where_tokens_hardly_vary(reference, learns, monkeypatch):
    """With one rate for all, b_dec is thrown past the data and most of the run is lost."""
    monkeypatch.setattr(start, "SPREAD", reference)
    x, config = hardly_varying(), TrainConfig(steps=100, batch_size=512, lr=8e-3, init_tokens=512)
    sae = SAE(SAEConfig(64, 256, k=8), generator=torch.Generator().manual_seed(0))
    *_, last = train(sae, iter(x.split(512)), config)
    assert (last.fvu < 0.2) is learns


def test_offsets_keep_the_full_rate_where_tokens_vary():
    sae = SAE(SAEConfig(8, 16, k=2, kind="topk"))
    for spread, factor in ((start.SPREAD, 1.0), (1.0, 1.0), (start.SPREAD / 2, 0.25)):
        groups = start.make_optimizer(sae, CONFIG, spread).param_groups
        assert [group["factor"] for group in groups] == pytest.approx([1.0, factor])
        assert {id(p) for p in groups[1]["params"]} == {id(sae.b_dec), id(sae.b_enc)}


@pytest.mark.parametrize("lr", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_learning_rate_that_cannot_train_is_refused(lr: float) -> None:
    with pytest.raises(UserError, match=f"^lr must be a number above 0, got {lr}"):
        TrainConfig(lr=lr)


@pytest.mark.parametrize(
    "values",
    [{"init_tokens": 0}, {"warmup_frac": float("nan")}, {"decay_frac": -0.1}],
)
def test_shares_and_tokens_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        TrainConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"l1": -1.0},
        {"l1_rate": -1.0},
        {"penalty": -1.0},
        {"auxk": float("nan")},
        {"bandwidth": float("nan")},
        {"auxk_k": 0},
        {"dead_after_tokens": 0},
    ],
)
def test_terms_of_sparsity_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        SparsityConfig(**values)  # type: ignore[arg-type]
