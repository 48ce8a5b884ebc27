"""Names of places as prompts, which tokens are read, and their pools against a plain pass."""

import copy
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_embed import perfect_sae

from sae_apps.geospatial.controls import token_features, untrained
from sae_apps.geospatial.places import Places
from sae_apps.geospatial.probe import encode_units, probe, probe_saes, probe_units
from sae_apps.geospatial.prompts import PRESETS, ProbeConfig, place_prompts
from sae_core.errors import UserError

HOOK = "layers.2.out"
NEURONS = "model.layers.2.mlp.down_proj.in"
NAMES = ["Zürich", "Ōsaka", "東京", "Lily Town", "Max", "Stoke-on-Trent {upon} Trent"]
# Activations of one token differ by rounding between batches of different width.
ROUNDING = 1e-4


def make_places(names=NAMES, admin=None) -> Places:
    n = len(names)
    table = pa.table(
        {
            "row_id": pa.array(np.arange(n) * 7 + 3, pa.int64()),
            "name": pa.array(names, pa.string()),
            "lat": pa.array(np.linspace(-40, 60, n)),
            "lon": pa.array(np.linspace(-100, 150, n)),
            "admin": pa.array(admin or [f"Land {i % 2}" for i in range(n)], pa.string()),
        }
    )
    return Places(table, "made up")


PLACES = make_places()


def bare(tokenizer):
    """The same tokenizer, which puts no BOS in front."""
    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other._tokenizer.post_processor = processors.Sequence([])
    assert other("a")["input_ids"][0] != other.bos_token_id
    return other


def named(lm, place: int, **settings) -> str:
    prompts = place_prompts(lm.tokenizer, PLACES, ProbeConfig(**settings))
    row = prompts.rows[place]
    return lm.tokenizer.decode(row.ids[row.keep])


def hidden(lm, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        out = lm.model(torch.from_numpy(ids)[None], output_hidden_states=True)
    return out.hidden_states[3][0]


# ---- prompts ----


def test_the_tokens_of_the_name_are_found_whatever_its_alphabet(tiny_lm) -> None:
    for place, name in enumerate(NAMES):
        for template in ("The city of {name}", "Go to {name}, {label}!", "{name} is here"):
            assert named(tiny_lm, place, template=template).strip() == name, template
    prompts = place_prompts(tiny_lm.tokenizer, PLACES, ProbeConfig())
    assert prompts.texts[1] == "The city of Ōsaka"
    # each byte of a character outside the vocabulary is a token: 3 + 3, and the leading space's is
    # not part of the name
    assert prompts.n_tokens[2] == 6
    assert prompts.n_tokens.tolist() == [int(row.keep.sum()) for row in prompts.rows]


def test_all_tokens_with_and_without_the_bos(tiny_lm) -> None:
    plain = replace(tiny_lm, tokenizer=bare(tiny_lm.tokenizer))
    bos = tiny_lm.tokenizer.bos_token_id
    for lm in (tiny_lm, plain):
        published = place_prompts(lm.tokenizer, PLACES, PRESETS["published"]).rows[3]
        assert published.ids[0] == bos and (published.ids[1:] != bos).all()
        assert published.keep.all()
        assert lm.tokenizer.decode(published.ids[1:]).strip() == "Lily Town, Land 1"
        unpooled = replace(PRESETS["published"], pool_bos=False)
        row = place_prompts(lm.tokenizer, PLACES, unpooled).rows[3]
        assert row.keep.tolist() == [False] + [True] * (len(row.ids) - 1)
    row = place_prompts(plain.tokenizer, PLACES, ProbeConfig()).rows[3]
    assert row.ids[0] != bos, "none is asked for"


def test_a_name_that_would_be_the_first_token_is_refused(tiny_lm) -> None:
    plain = bare(tiny_lm.tokenizer)
    with pytest.raises(UserError, match="something before the name .* 'Zürich' .row_id 3. would"):
        place_prompts(plain, PLACES, ProbeConfig("{name}"))
    for config in (ProbeConfig("{name}", bos=True), ProbeConfig("In {name}")):
        assert not any(row.keep[0] for row in place_prompts(plain, PLACES, config).rows)
    assert place_prompts(tiny_lm.tokenizer, PLACES, ProbeConfig("{name}")).rows[0].ids[0] == 1


def test_shuffled_names_keep_their_tokens_and_everything_else(tiny_lm) -> None:
    config = ProbeConfig("The city of {name} is in {label}", shuffle_seed=5)
    plain = place_prompts(tiny_lm.tokenizer, PLACES, replace(config, shuffle_seed=None))
    mixed = place_prompts(tiny_lm.tokenizer, PLACES, config)
    again = place_prompts(tiny_lm.tokenizer, PLACES.take([4, 1, 5]), config)
    other = place_prompts(tiny_lm.tokenizer, PLACES, replace(config, shuffle_seed=6))
    moved = 0
    for before, after in zip(plain.rows, mixed.rows, strict=True):
        np.testing.assert_array_equal(before.keep, after.keep)
        np.testing.assert_array_equal(before.ids[~before.keep], after.ids[~before.keep])
        assert sorted(before.ids) == sorted(after.ids)
        moved += (before.ids != after.ids).any()
    assert moved >= 4, "control: names change"
    np.testing.assert_array_equal(again.rows[1].ids, mixed.rows[1].ids)  # a place's own order
    assert any((a.ids != b.ids).any() for a, b in zip(mixed.rows, other.rows, strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template": "no place"}, r"\{name\} once .* got 0 times"),
        ({"template": "{name} {name}"}, "got 2 times"),
        ({"template": "{name!r}"}, "plain fields"),
        ({"template": "{} {name}"}, "plain fields"),
        ({"template": "{name"}, "a template such as"),
        ({"tokens": "some"}, "tokens to be one of .*, got 'some'"),
        ({"pooling": "sum"}, "pooling to be one of .*, got 'sum'"),
        ({"pool_in": "space"}, "pool_in to be one of .*, got 'space'"),
        ({"pool_bos": True}, "tokens 'all' with pool_bos, got 'name'"),
        ({"batch_tokens": 0}, "batch_tokens of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, said) -> None:
    with pytest.raises(UserError, match=said):
        ProbeConfig(**settings)


def test_bad_columns_and_tokenizers_are_refused(tiny_lm) -> None:
    with pytest.raises(UserError, match=r"label or row_id, name.*, got \{region\}"):
        place_prompts(tiny_lm.tokenizer, PLACES, ProbeConfig("In {region}: {name}"))
    some = make_places(NAMES[:2], ["Land", None])
    with pytest.raises(UserError, match=r"value of label .* none for 'Ōsaka' \(row_id 10\)"):
        place_prompts(tiny_lm.tokenizer, some, PRESETS["published"])
    assert len(place_prompts(tiny_lm.tokenizer, some, ProbeConfig()).rows) == 2
    without = copy.deepcopy(tiny_lm.tokenizer)
    without.bos_token = None
    with pytest.raises(UserError, match="a tokenizer with a BOS"):
        place_prompts(without, PLACES, PRESETS["published"])
    with pytest.raises(UserError, match="fast tokenizer, .* got object"):
        place_prompts(object(), PLACES, ProbeConfig())


# ---- pools ----


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("pool_in", ["features", "activations"])
def test_a_place_is_the_pool_of_one_plain_pass(tiny_lm, pooling, pool_in) -> None:
    config = ProbeConfig(pooling=pooling, pool_in=pool_in, batch_tokens=64)
    sae = perfect_sae()
    got = probe(tiny_lm, sae, HOOK, PLACES, config)
    units = probe_units(tiny_lm, [HOOK, NEURONS], PLACES, config)
    assert units[NEURONS].shape == (6, tiny_lm.model.config.intermediate_size)
    pool = {"last": lambda v: v[-1], "mean": lambda v: v.mean(0), "max": lambda v: v.max(0)}[
        pooling
    ]
    prompts = place_prompts(tiny_lm.tokenizer, PLACES, config)
    for i, row in enumerate(prompts.rows):
        x = hidden(tiny_lm, row.ids)[torch.from_numpy(row.keep)]
        np.testing.assert_allclose(units[HOOK][i], pool(x.numpy()), atol=ROUNDING)
        if pool_in == "features":
            want = pool(sae.encode(x).numpy())
        else:
            want = sae.encode(torch.from_numpy(pool(x.numpy()))[None])[0].numpy()
        np.testing.assert_allclose(got.acts.toarray()[i], want, atol=ROUNDING)
    assert got.rows.column_names == ["row_id", "prompt", "n_tokens", "n_pooled"]
    np.testing.assert_array_equal(got.row_ids, PLACES.row_id)
    assert config.template in got.provenance.data_id and "made up" in got.provenance.data_id


def test_the_order_of_pooling_and_encoding_matters_but_for_the_last(tiny_lm) -> None:
    sae = perfect_sae()

    def acts(pooling: str, pool_in: str) -> np.ndarray:
        config = ProbeConfig(pooling=pooling, pool_in=pool_in)
        return probe(tiny_lm, sae, HOOK, PLACES, config).acts.toarray()

    np.testing.assert_array_equal(acts("last", "features"), acts("last", "activations"))
    assert np.abs(acts("mean", "features") - acts("mean", "activations")).max() > 100 * ROUNDING


def test_the_published_preset_averages_the_bos_too(tiny_lm) -> None:
    """mean = (BOS + sum of the rest) / T: the part in 1/T that the notes describe."""
    with_bos = probe_units(tiny_lm, [HOOK], PLACES, PRESETS["published"])[HOOK]
    without = probe_units(tiny_lm, [HOOK], PLACES, replace(PRESETS["published"], pool_bos=False))[
        HOOK
    ]
    prompts = place_prompts(tiny_lm.tokenizer, PLACES, PRESETS["published"])
    t = np.array([len(row.ids) for row in prompts.rows])[:, None]
    sink = hidden(tiny_lm, prompts.rows[0].ids)[0].numpy()
    np.testing.assert_allclose(with_bos, (sink + (t - 1) * without) / t, atol=ROUNDING)


def test_several_saes_in_one_pass_are_each_as_alone(tiny_lm) -> None:
    saes = {"a": (perfect_sae(), HOOK), "b": (perfect_sae(seed=1), "layers.1.out")}
    config = ProbeConfig(pooling="mean")
    both = probe_saes(tiny_lm, saes, PLACES, config)
    for name, (sae, point) in saes.items():
        alone = probe(tiny_lm, sae, point, PLACES, config)
        np.testing.assert_allclose(both[name].acts.toarray(), alone.acts.toarray(), atol=ROUNDING)
        assert both[name].provenance == alone.provenance
    with pytest.raises(UserError, match="at least one SAE, got none"):
        probe_saes(tiny_lm, {}, PLACES)
    for pooling in ("mean", "last"):
        with pytest.raises(UserError, match="width d_in 32, but layers.2.out of .* has 64"):
            probe(tiny_lm, perfect_sae(32), HOOK, PLACES, ProbeConfig(pooling=pooling))


def test_encoded_units_are_those_of_the_sae(tiny_lm) -> None:
    sae, x = perfect_sae(), np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32)
    got = encode_units(tiny_lm, sae, HOOK, x)
    want = sae.encode(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got.toarray(), want, atol=1e-5)
    assert got.shape == (5000, 128) and (got.data > 0).all()


# ---- controls ----


def test_the_untrained_model_has_other_weights_and_the_same_shape(tiny_lm) -> None:
    state = torch.random.get_rng_state()
    one, same, other = untrained(tiny_lm), untrained(tiny_lm), untrained(tiny_lm, seed=1)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is untouched"
    for name, weights in tiny_lm.model.named_parameters():
        mine = one.model.get_parameter(name)
        assert torch.equal(mine, same.model.get_parameter(name))
        assert mine.shape == weights.shape and not mine.requires_grad
        if weights.ndim == 2:
            assert not torch.allclose(mine, weights)
            assert not torch.equal(mine, other.model.get_parameter(name))
    assert "untrained" in one.model_id and one.revision == "random weights, seed 0"
    assert not one.model.training
    got = probe_units(one, [HOOK], PLACES)[HOOK]
    np.testing.assert_array_equal(got, probe_units(same, [HOOK], PLACES)[HOOK])
    assert np.abs(got - probe_units(tiny_lm, [HOOK], PLACES)[HOOK]).max() > 0.1


def test_token_features_count_the_tokens_of_the_name(tiny_lm) -> None:
    got = token_features(tiny_lm, PLACES, ProbeConfig("Go to {name}, {label}", shuffle_seed=1))
    prompts = place_prompts(tiny_lm.tokenizer, PLACES, ProbeConfig("Go to {name}, {label}"))
    for i, row in enumerate(prompts.rows):
        want = np.bincount(row.ids[row.keep], minlength=len(tiny_lm.tokenizer))
        np.testing.assert_array_equal(got.acts.toarray()[i], want)
    assert got.acts.max() > 1, "a token twice counts twice"
