"""Monet's routing as features, and masks of experts: exact, and through the applications."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_core.errors import CorruptFileError, UserError
from sae_core.features import SparseFeatures
from sae_core.featurize import featurize
from sae_core.models import LanguageModel, load_model
from sae_core.monet.masks import ExpertMask, masked_experts, router_layers
from sae_core.monet.router import MonetRouter
from sae_core.monet.routing import ExpertRouting, expert_codes, expert_routing
from sae_core.text import rows_from_texts
from tests.tiny_monet import WORDS, save_monet, tiny_monet

SENTENCES = ("the cat sees a big dog", "der hund mag die katze", "sun moon", "the bird eats .")
ROUNDING = 1e-6  # float32 sums of three products below 1


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(str(save_monet(tmp_path_factory.mktemp("monet"), tiny_monet())))


def gates(t: int = 40, heads: int = 3, n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    router = MonetRouter(16, heads, n, 2)
    for _ in range(40):
        router(torch.randn(200, 16))
    return router.eval()(torch.randn(t, 16))


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.2, 0.6])
def test_codes_are_all_experts_at_or_above_the_threshold(threshold: float) -> None:
    g1, g2 = gates()
    dense = torch.einsum("thi,thj->tij", g1, g2).flatten(1)
    want = torch.where((dense >= threshold) & (dense > 0), dense, 0.0)
    got = expert_codes((g1, g2), threshold)
    assert got.d_sae == 64 and (got.to_dense() - want).abs().max() < ROUNDING
    assert torch.equal(got.to_dense() > 0, want > 0) and bool((want > 0).any())
    for start, end in zip(got.crow[:-1].tolist(), got.crow[1:].tolist(), strict=True):
        assert (got.col[start:end].diff() > 0).all()


def test_a_sum_over_heads_counts_though_no_head_reaches_the_threshold() -> None:
    g = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]])  # each head .36 for the first pair, the sum .72
    got = expert_codes((g, g), 0.5)
    assert got.col.tolist() == [0] and got.values.item() == pytest.approx(0.72)


def test_features_are_the_routing_of_the_model(lm: LanguageModel) -> None:
    routing = expert_routing(lm.model, 2, threshold=0.05)
    found = featurize(
        lm, routing, rows_from_texts(list(SENTENCES)), routing.hook_point, pooling="none",
        data_id="test",
    )  # fmt: skip
    rows = found.rows.to_pylist()
    for source, sentence in enumerate(SENTENCES):
        inputs = lm.tokenizer(sentence, return_tensors="pt")["input_ids"]
        g1, g2 = lm.model(input_ids=inputs, output_router_probs=True).router_probs[2]
        dense = torch.einsum("thi,thj->tij", g1[0], g2[0]).flatten(1).detach().numpy()
        for i, row in enumerate(rows):
            if row["source_row_id"] == source:
                want = np.where(dense[row["position"]] >= 0.05, dense[row["position"]], 0)
                assert np.abs(found.acts[[i]].toarray()[0] - want).max() < ROUNDING
    assert found.provenance.hook_point == "model.layers.2.router.in"
    assert not lm.model.model.layers[2].router.training
    other = expert_routing(lm.model, 2, threshold=0.06)
    assert found.provenance.sae_hash == routing.hash() != other.hash()
    assert expert_routing(lm.model, 0, threshold=0.05).hash() != routing.hash()


def test_halves_are_the_gates_summed_over_heads(lm: LanguageModel) -> None:
    routing = expert_routing(lm.model, 0, threshold=0.0, units="halves")
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    g1, g2 = lm.model.model.layers[0].router(x)
    routing.router.train()
    dense = routing.encode_sparse(x).to_dense()  # with running moments in any mode, which it keeps
    assert routing.router.training
    routing.router.eval()
    assert routing.d_sae == 16 and torch.allclose(dense, torch.cat((g1.sum(1), g2.sum(1)), 1))


def features(lm: LanguageModel, texts: list[str], pooling: str = "mean") -> SparseFeatures:
    routing = expert_routing(lm.model, 0)
    return featurize(
        lm, routing, rows_from_texts(texts), routing.hook_point, pooling=pooling, data_id="test"
    )


def test_selection_runs_on_experts(lm: LanguageModel) -> None:
    from sae_apps.selection.similarity import nearest

    english = [f"the {a} {v} a {b}" for a in ("cat", "dog", "bird") for v in ("sees", "eats")
               for b in ("sun", "moon")]  # fmt: skip
    german = [f"die {a} {v} der {b}" for a in ("katze", "sonne") for v in ("mag", "isst")
              for b in ("hund", "mond")]  # fmt: skip
    found = features(lm, [*english, *german])
    picks = nearest(found.acts[:-1], found.acts[[-1]], 3)
    assert (picks.index[0] >= len(english)).all()  # German is nearest to German


def test_geography_runs_on_experts(lm: LanguageModel) -> None:
    from sae_apps.geospatial import moran, spatial_weights

    rng = np.random.default_rng(0)
    names = [f"{'cat sun' if i < 30 else 'hund mond'} {WORDS[rng.integers(1, 33)]}"
             for i in range(60)]  # fmt: skip
    lat, lon = rng.uniform(40, 45, 60), np.where(np.arange(60) < 30, 0, 20) + rng.uniform(0, 5, 60)
    table = moran(features(lm, names), spatial_weights(lat, lon, k=5), permutations=99, seed=0)
    assert np.nanmax(table.column("I")) > 0.5  # words differ between the two sides


def test_separability_runs_on_experts(lm: LanguageModel) -> None:
    from sae_apps.suppression import LabelledTexts, MeasureConfig, measure, open_units, separability
    from sae_apps.suppression.stream import unit_stream

    texts = [f"{a} {b}" for a in ("the cat", "a dog", "the bird") for b in ("sees", "runs", "eats")]
    german = ("die katze", "der hund", "das")
    texts += [f"{a} {b}" for a in german for b in ("sieht", "mag", "isst")]
    data = LabelledTexts("languages", tuple(texts), ("en",) * 9 + ("de",) * 9)
    routing = expert_routing(lm.model, 0)
    units = open_units(lm, routing, routing.hook_point)
    config = MeasureConfig(n_bins=4)
    counted = measure(unit_stream(lm, units, data), data, units.n_units, config=config)
    table = separability(*counted).table
    best = int(np.asarray(table["debiased"]).argmax())
    assert table.num_rows == 64 and table["debiased"][best].as_py() > 0.4
    with pytest.raises(UserError, match="no fixed direction"):
        units.take(torch.tensor([best]))


# ---- masks ----


def logits(lm: LanguageModel) -> Tensor:
    inputs = torch.randint(1, 30, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return lm.model(input_ids=inputs).logits


def random_mask(seed: int, share: float, layers: tuple[int, ...] = (0, 2)) -> ExpertMask:
    rng = np.random.default_rng(seed)
    return ExpertMask.from_keep({layer: rng.random((8, 8)) >= share for layer in layers}, "test")


def test_a_mask_acts_on_all_layers_of_its_router_and_ends(lm: LanguageModel) -> None:
    plain, seen = logits(lm), []
    with masked_experts(lm.model, random_mask(0, 0.5, (0,))):
        replaced = ["forward" in vars(block.moe) for block in lm.model.model.layers]
        seen.append(logits(lm))
    assert replaced == [True, True, False, False] and not torch.equal(seen[0], plain)
    assert torch.equal(logits(lm), plain)
    with pytest.raises(RuntimeError, match="stop"), masked_experts(lm.model, random_mask(0, 0.5)):
        raise RuntimeError("stop")
    assert torch.equal(logits(lm), plain)
    with masked_experts(lm.model, ExpertMask(8, {0: np.array([], dtype=np.int64)})):
        assert torch.equal(logits(lm), plain)


def test_few_and_many_deleted_experts_go_different_ways_to_one_result(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, found = random_mask(1, 0.3), []
    for few in (0, 10**9):  # always by pairs, never
        monkeypatch.setattr("sae_core.monet.masks._FEW", few)
        with masked_experts(lm.model, mask):
            found.append(logits(lm))
    assert (found[0] - found[1]).abs().max() < 1e-5
    monkeypatch.setattr("sae_core.monet.masks._ENTRIES", 100)  # in pieces of one token
    with masked_experts(lm.model, mask):
        assert (logits(lm) - found[1]).abs().max() < 1e-5


def test_generation_under_a_mask_uses_the_cache(lm: LanguageModel) -> None:
    ids = lm.tokenizer("the cat sees", return_tensors="pt")["input_ids"]
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    common: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with masked_experts(lm.model, random_mask(2, 0.5)):
        cached = lm.model.generate(**prompt, **common)
        whole = lm.model.generate(**prompt, use_cache=False, **common)
    assert torch.equal(cached, whole)


def test_masks_join_save_and_load(lm: LanguageModel, tmp_path: Path) -> None:
    a, b = random_mask(3, 0.3, (0,)), random_mask(4, 0.3)
    both = a | b
    assert set(both.removed[0]) == set(a.removed[0]) | set(b.removed[0])
    assert np.array_equal(both.removed[2], b.removed[2]) and both.size > b.size
    both.save(tmp_path / "m.safetensors")
    back = ExpertMask.load(tmp_path / "m.safetensors")
    assert back.note == "test + test" and back.n == 8
    assert all(np.array_equal(back.removed[layer], both.removed[layer]) for layer in (0, 2))
    with masked_experts(lm.model, both):
        want = logits(lm)
    with masked_experts(lm.model, back):
        assert torch.equal(logits(lm), want)


def test_what_does_not_fit_is_refused(lm: LanguageModel, tmp_path: Path, tiny_lm: Any) -> None:
    with pytest.raises(UserError, match=r"masks \[n, n\] of one size, got \[\(8, 7\)\]"):
        ExpertMask.from_keep({0: np.ones((8, 7))})
    with pytest.raises(UserError, match="0 and 1 in layer 0"):
        ExpertMask.from_keep({0: np.full((8, 8), 2)})
    with pytest.raises(UserError, match=r"experts in 0\.\.63 in layer 0, got 3\.\.64"):
        ExpertMask(8, {0: np.array([3, 64])})
    with pytest.raises(UserError, match="ascending, each once"):
        ExpertMask(8, {0: np.array([3, 3])})
    with (
        pytest.raises(UserError, match="over 8 x 8 experts, got 9 x 9"),
        masked_experts(lm.model, ExpertMask(9, {})),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"routers of layers \[0, 2\], got \[1\]"),
        masked_experts(lm.model, ExpertMask(8, {1: np.array([1])})),
    ):
        pass
    mask, moe = random_mask(0, 0.5), lm.model.model.layers[1].moe
    with masked_experts(lm.model, mask):
        with pytest.raises(UserError, match="join the two"), masked_experts(lm.model, mask):
            pass
        assert "forward" in vars(moe)  # the first mask is still on
    moe.forward = moe.forward  # as accelerate wraps it
    with pytest.raises(UserError, match="another library"), masked_experts(lm.model, mask):
        pass
    del moe.forward
    assert not any("forward" in vars(block.moe) for block in lm.model.model.layers)
    with pytest.raises(UserError, match="Expected a Monet model with routers"):
        router_layers(tiny_lm.model)
    with pytest.raises(UserError, match=r"one of \[0, 2\], got 1"):
        expert_routing(lm.model, 1)
    with pytest.raises(UserError, match=r"threshold in \[0, 1\), got 1"):
        ExpertRouting(lm.model.model.layers[0].router, "x", threshold=1.0)
    with pytest.raises(UserError, match="at .*nothing"):
        ExpertMask.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"1234567890")
    with pytest.raises(CorruptFileError):
        ExpertMask.load(tmp_path / "bad")
    facts = {"format": "sae-apps-expert-mask-1", "n": "8", "note": ""}
    for name, values in (("removed", [1]), ("layers.x.removed", [1]), ("layers.0.removed", [64])):
        save_file({name: torch.tensor(values)}, tmp_path / "bad", facts)
        with pytest.raises(CorruptFileError, match="expected a mask of experts"):
            ExpertMask.load(tmp_path / "bad")
    save_file({"x": torch.ones(1)}, tmp_path / "bad")
    with pytest.raises(UserError, match="got no format"):
        ExpertMask.load(tmp_path / "bad")
