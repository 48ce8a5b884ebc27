"""Features made shard by shard: interrupted or not, the bytes are those of an unbroken call."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core.activations import HarvestConfig
from sae_core.errors import CorruptFileError, UserError
from sae_core.feature_shards import PLAN, FeaturePlan, featurize_to, forget_shards, partial_folder
from sae_core.featurize import featurize
from sae_core.sae import SAE, SAEConfig
from sae_core.store import load_features
from sae_core.text import TextRow, TextSource, rows_from_texts
from tests.command import one_sentence

HOOK_POINT = "layers.2.out"
ROUNDING = 1e-4  # of one token in batches of different width
FILES = ("features.safetensors", "rows.parquet", "provenance.json")
STORY = "Tom saw a big {} in the park. He was very happy and ran to the {}. "
# eleven rows in shards of two; shard 2 has no token to keep, shard 3 a row of several windows
TEXTS = [STORY.format(one, one) for one in ("dog", "cat", "bird", "ball")] + ["", ""]
TEXTS += [STORY.format(one, one) * 3 for one in ("car", "tree", "boat", "frog", "cake")]
META = [{"n": i if i < 4 else f"no {i}"} for i in range(11)]


@pytest.fixture(scope="module")
def sae() -> SAE:
    model = SAE(SAEConfig(64, 96, kind="relu"), generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.b_enc -= 0.15
    return model


@pytest.fixture
def rows() -> TextSource:
    return rows_from_texts(TEXTS, META)


def plan(pooling: str = "max", shard_rows: int = 2) -> FeaturePlan:
    config = HarvestConfig(context_size=16, batch_tokens=64, window_rows=4)
    return FeaturePlan(HOOK_POINT, "texts", pooling, config, 3, shard_rows)


def stop_after(tokens: int) -> Callable[[int], None]:
    """Progress that ends the work behind so many tokens, as a signal does."""
    seen = [0]

    def progress(n: int) -> None:
        seen[0] += n
        if seen[0] > tokens:
            raise KeyboardInterrupt

    return progress


def stored(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("pooling", ["max", "mean", "none"])
def test_one_shard_holds_what_featurize_gives(
    tiny_lm, sae: SAE, rows, tmp_path: Path, pooling: str
) -> None:
    asked = plan(pooling, shard_rows=100)
    made = featurize_to(tmp_path / "f", tiny_lm, sae, rows, asked)
    whole = featurize(
        tiny_lm,
        sae,
        rows,
        HOOK_POINT,
        pooling=pooling,
        config=asked.config,
        data_id="texts",
        seed=3,
    )
    for found in (made, load_features(tmp_path / "f")):
        assert found.rows.equals(whole.rows) and found.provenance == whole.provenance
        assert found.acts.shape == whole.acts.shape and (found.acts != whole.acts).nnz == 0
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    many = featurize_to(tmp_path / "g", tiny_lm, sae, rows, plan(pooling))
    assert many.rows.equals(whole.rows)
    np.testing.assert_allclose(many.acts.toarray(), whole.acts.toarray(), atol=ROUNDING)
    assert many.acts.nnz > 100


@pytest.mark.parametrize("pooling", ["max", "none"])
def test_an_interrupted_call_continues_to_the_same_bytes(
    tiny_lm, sae: SAE, rows, tmp_path: Path, pooling: str
) -> None:
    counts: list[int] = []
    featurize_to(tmp_path / "whole", tiny_lm, sae, rows, plan(pooling), progress=counts.append)
    out, held = tmp_path / "f", partial_folder(tmp_path / "f")
    kept: dict[str, int] = {}
    for n in (sum(counts) // 3, 2 * sum(counts) // 3):
        with pytest.raises(KeyboardInterrupt):
            featurize_to(out, tiny_lm, sae, rows, plan(pooling), progress=stop_after(n))
        stamps = {p.name: p.stat().st_mtime_ns for p in held.glob("shard-*")}
        assert len(kept) < len(stamps) < 6 and kept.items() <= stamps.items()
        kept = stamps
        assert not out.exists()
    again: list[int] = []
    featurize_to(out, tiny_lm, sae, rows, plan(pooling), progress=again.append)
    assert sum(again) == sum(counts) and stored(out) == stored(tmp_path / "whole")
    assert not held.exists() and not list(tmp_path.glob(".*"))


def test_other_work_in_the_way_is_named_and_kept(tiny_lm, sae: SAE, rows, tmp_path: Path) -> None:
    out, held = tmp_path / "f", partial_folder(tmp_path / "f")
    with pytest.raises(KeyboardInterrupt):
        featurize_to(out, tiny_lm, sae, rows, plan(), progress=stop_after(60))
    assert held.is_dir()
    other = SAE(SAEConfig(64, 96, kind="relu"), generator=torch.Generator().manual_seed(1))

    def make(sae: SAE = sae, asked: FeaturePlan = plan()) -> Callable[[], object]:  # noqa: B008
        return lambda: featurize_to(out, tiny_lm, sae, rows, asked)

    one_sentence(make(asked=plan("mean")), "pooling = 'max', this call has pooling = 'mean'")
    one_sentence(make(asked=plan(shard_rows=3)), "shard_rows = 2")
    one_sentence(make(other), "sae_hash")
    codes = held / "shard-00000" / "codes.safetensors"
    original = codes.read_bytes()
    codes.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    one_sentence(make(), "codes.safetensors was altered", CorruptFileError)
    codes.write_bytes(original)
    (held / PLAN).unlink()
    one_sentence(make(), "other files")
    assert codes.is_file()
    forget_shards(out)  # without a plan it is not known to be ours
    assert codes.is_file()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").write_text("x")
    one_sentence(lambda: featurize_to(taken, tiny_lm, sae, rows, plan()), "new or empty folder")


def test_shards_of_another_origin_are_not_mixed(tiny_lm, sae: SAE, rows, tmp_path: Path) -> None:
    out = tmp_path / "f"
    with pytest.raises(KeyboardInterrupt):
        featurize_to(out, tiny_lm, sae, rows, plan(), progress=stop_after(60))
    moved = replace(tiny_lm, revision="other")  # the weights behind the name have changed
    with pytest.raises(UserError, match="model_revision .* expected 'other'"):
        featurize_to(out, moved, sae, rows, plan())


def test_a_call_that_finished_no_shard_leaves_nothing(tiny_lm, sae: SAE, tmp_path: Path) -> None:
    narrow = SAE(SAEConfig(63, 96, kind="relu"))
    rows = rows_from_texts(TEXTS)
    with pytest.raises(UserError, match="width d_in 63"):
        featurize_to(tmp_path / "f", tiny_lm, narrow, rows, plan())
    with pytest.raises(UserError, match="at least one row of text"):
        featurize_to(tmp_path / "f", tiny_lm, sae, [], plan())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="shard_rows of at least 1, got 0"):
        plan(shard_rows=0)
    with pytest.raises(UserError, match="got 'median'"):
        plan("median")
    silent = rows_from_texts(["", ""])
    with pytest.raises(UserError, match="at least one token to keep, got none in 2 rows"):
        featurize_to(tmp_path / "f", tiny_lm, sae, silent, plan("none", 1))
    twice = [TextRow(1, "The cat sat.", {}), TextRow(2, "", {}), TextRow(1, "The dog ran.", {})]
    with pytest.raises(UserError, match="got 1 2 times"):
        featurize_to(tmp_path / "g", tiny_lm, sae, twice, plan())
    assert not (tmp_path / "f").exists() and not (tmp_path / "g").exists()


def test_what_a_kill_left_behind_whole_features_goes(tiny_lm, sae, rows, tmp_path: Path) -> None:
    held = partial_folder(tmp_path / "f")
    held.mkdir()
    (held / PLAN).write_text("{}")
    forget_shards(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
