"""SAEs of SAELens, sparsify and dictionary_learning compute here what their libraries compute."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_core.errors import CorruptFileError, UserError
from sae_core.interop import (
    foreign_format,
    read_dictionary_learning,
    read_foreign,
    read_sae_lens,
    read_sparsify,
)
from tests.interop_folders import NAMES, expected, golden, lay, tensors_of

FLOAT32 = 1e-5  # products of 4 numbers of size 10, in float32 on both sides
LENS, DL = "sae_lens: ", "dictionary_learning: "


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    case = golden(name)
    wanted = expected(case)
    converted = read_foreign(lay(tmp_path / case["case"], case), x=wanted["x"])
    codes, x_hat = converted.sae.encode(wanted["x"]), converted.sae.reconstruct(wanted["x"])
    assert torch.equal(codes != 0, wanted["codes"] != 0) and (codes != 0).any()
    torch.testing.assert_close(codes, wanted["codes"], rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(x_hat, wanted["x_hat"], rtol=FLOAT32, atol=FLOAT32)
    assert converted.facts["converted_from"].startswith(case["library"])


@pytest.mark.parametrize(
    ("name", "kind", "note"),
    [
        (f"{LENS}topk, rescaled by decoder norm", "topk", "norms of the decoder rows"),
        (f"{LENS}gated", "jumprelu", "one JumpReLU with a threshold"),
        (f"{LENS}standard, b_dec not subtracted", "relu", "b_dec W_enc was added to b_enc"),
        (f"{LENS}standard, constant_norm_rescale", "relu", "norm 1 instead of sqrt(d_in)"),
        (f"{LENS}batchtopk, training save", "batch_topk", "inference model"),
        ("sparsify: topk, multi_topk", "topk", "Multi-TopK"),
        (f"{DL}AutoEncoder", "relu", "normalize_decoder=False"),
        (f"{DL}AutoEncoderTopK", "topk", "threshold beside the k largest"),
        (f"{DL}MatryoshkaBatchTopKSAE", "batch_topk", "nested groups (2, 6 latents)"),
        (f"{DL}JumpReluAutoEncoder", "jumprelu", "b_dec W_enc was added to b_enc"),
    ],
)
def test_what_was_folded_is_said(name: str, kind: str, note: str, tmp_path: Path) -> None:
    converted = read_foreign(lay(tmp_path / "sae", golden(name)))
    assert converted.sae.config.kind == kind
    assert any(note in sentence for sentence in converted.notes), converted.notes


def test_an_exact_copy_has_no_notes(tmp_path: Path) -> None:
    assert read_sae_lens(lay(tmp_path / "sae", golden(f"{LENS}standard"))).notes == ()


def test_a_threshold_below_zero_lets_every_positive_latent_fire(tmp_path: Path) -> None:
    case = golden(f"{DL}BatchTopKSAE")
    tensors = tensors_of(case) | {"threshold": torch.tensor(-1.0)}
    converted = read_dictionary_learning(lay(tmp_path / "sae", case, tensors))
    assert any("never estimated" in note for note in converted.notes)
    x = expected(case)["x"]
    weight, bias, b_dec = (tensors[n] for n in ("encoder.weight", "encoder.bias", "b_dec"))
    pre = (x - b_dec) @ weight.T + bias
    torch.testing.assert_close(converted.sae.encode(x), pre.relu(), rtol=FLOAT32, atol=FLOAT32)
    assert (pre < 0).any()


def test_the_activation_scale_of_a_checkpoint_is_folded(tmp_path: Path) -> None:
    case, scale = golden(f"{LENS}standard"), 0.25
    folder = lay(tmp_path / "sae", case, normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match="without a scaling factor in activation_scaler.json"):
        read_sae_lens(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    sae, wanted = read_sae_lens(folder).sae, expected(case)
    torch.testing.assert_close(sae.encode(wanted["x"] / scale), wanted["codes"])
    torch.testing.assert_close(sae.reconstruct(wanted["x"] / scale), wanted["x_hat"] / scale)


def test_the_facts_of_saelens_are_carried(tmp_path: Path) -> None:
    case = golden(f"{LENS}jumprelu")
    metadata = {"model_name": "gpt2", "hook_name": "blocks.7.hook_mlp_out"}
    folder = lay(tmp_path / "sae", case, metadata=metadata)
    freq = torch.tensor([0.0, 1e-4, 0.5, 1.0, 0, 0, 0, 0])
    save_file({"sparsity": (freq + 1e-10).log10()}, folder / "sparsity.safetensors")
    (folder / "runner_cfg.json").write_text("{}")
    converted = read_sae_lens(folder)
    assert converted.facts["model_id"] == "gpt2"
    assert converted.facts["hook_point"] == "layers.7.mlp.out"
    assert converted.facts["freq"] == pytest.approx(freq.tolist(), abs=1e-6)
    assert any("runner_cfg.json" in note for note in converted.notes)
    lay(folder, case, metadata={"hook_name": "blocks.7.attn.hook_z"})
    converted = read_sae_lens(folder)
    assert "hook_point" not in converted.facts
    assert any("hook_z" in note for note in converted.notes)


def test_a_configuration_of_saelens_before_version_6_is_understood(tmp_path: Path) -> None:
    case = golden(f"{LENS}topk")
    folder = lay(tmp_path / "sae", case)
    old = {"d_in": 4, "d_sae": 8, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
    (folder / "cfg.json").write_text(str(old).replace("'", '"'))
    sae, wanted = read_sae_lens(folder).sae, expected(case)
    torch.testing.assert_close(sae.encode(wanted["x"]), wanted["codes"])


def test_half_precision_is_held_exactly_and_said(tmp_path: Path) -> None:
    case = golden(f"{LENS}standard")
    half = {name: tensor.bfloat16() for name, tensor in tensors_of(case).items()}
    converted = read_sae_lens(lay(tmp_path / "sae", case, half))
    assert torch.equal(converted.sae.W_enc, half["W_enc"].float())
    assert any("bfloat16 and held exactly" in note for note in converted.notes)


def test_places_are_named_from_folders_and_configurations(tmp_path: Path) -> None:
    case = golden("sparsify: topk")
    for place in ("layers.5.mlp", "layers.5.mlp/seed3"):
        converted = read_sparsify(lay(tmp_path / place, case))
        assert converted.facts["hook_point"] == "layers.5.mlp.out"
    case = golden(f"{DL}AutoEncoder")
    more = {"layer": 8, "submodule_name": "resid_post_layer_8", "lm_name": "google/gemma-2-2b"}
    facts = read_dictionary_learning(lay(tmp_path / "trainer_0", case, **more)).facts
    assert facts["hook_point"] == "layers.8.out" and facts["model_id"] == "google/gemma-2-2b"


# ---- what is refused ----


class Attack:
    """A pickle that writes a file when it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "owned"))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_malicious_pickle_is_refused_and_never_run(is_zip: bool, tmp_path: Path) -> None:
    case = golden(f"{DL}AutoEncoder")
    folder, target = lay(tmp_path / "sae", case), tmp_path / "owned.txt"
    state = {**tensors_of(case), "extra": Attack(target)}
    if is_zip:
        torch.save(state, folder / "ae.pt")
    else:
        (folder / "ae.pt").write_bytes(pickle.dumps(state))
    with pytest.raises(UserError, match="tensors alone, got a pickle that asks for more"):
        read_foreign(folder)
    assert not target.exists()
    torch.load(folder / "ae.pt", weights_only=False) if is_zip else pickle.loads(
        (folder / "ae.pt").read_bytes()
    )
    assert target.read_text() == "owned", "control: the pickle is dangerous"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (f"{LENS}standard", {"architecture": "temporal"}, "architecture of .* got 'temporal'"),
        (f"{LENS}standard", {"normalize_activations": "layer_norm"}, "got 'layer_norm', not held"),
        (f"{LENS}standard", {"reshape_activations": "conv"}, "none or hook_z in .* got 'conv'"),
        (f"{LENS}standard", {"d_in": "four"}, "d_in as int, got 'four'"),
        (f"{LENS}standard", {"activation_fn": "tanh-relu"}, "relu in .* got 'tanh-relu'"),
        (f"{LENS}topk", {"k": 9}, r"k in 1\.\.8, got 9"),
        ("sparsify: topk", {"activation": "groupmax"}, "'topk' in .* got 'groupmax'"),
        ("sparsify: topk", {"transcode": True}, "got a transcoder"),
        ("sparsify: topk", {"skip_connection": True}, "skip connection"),
        ("sparsify: topk", {"k": 0}, r"k in 1\.\.8, got 0"),
        ("sparsify: topk", {"d_in": None}, "d_in as int, got None"),
        (f"{DL}AutoEncoder", {"dict_class": "CrossCoder"}, "dict_class of .* got 'CrossCoder'"),
        (f"{DL}BatchTopKSAE", {"k": 3}, "the same k, got 3 and 2"),
        (f"{DL}AutoEncoder", {"dict_size": 9}, r"shape \[9, 4\], got \[8, 4\]"),
    ],
)
def test_a_configuration_that_cannot_be_held(
    name: str, config: dict, message: str, tmp_path: Path
) -> None:
    folder = lay(tmp_path / "sae", golden(name), **config)
    with pytest.raises(UserError, match=message):
        read_foreign(folder)


@pytest.mark.parametrize("name", [f"{LENS}jumprelu", "sparsify: topk", f"{DL}GatedAutoEncoder"])
def test_other_names_shapes_and_values_are_refused(name: str, tmp_path: Path) -> None:
    case, folder = golden(name), tmp_path / "sae"
    tensors = tensors_of(case)
    first = sorted(tensors)[0]
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != first}, f"must hold the tensors .*{first}"),
        (tensors | {"W_extra": torch.zeros(2)}, "got .*W_extra"),
        (tensors | {first: tensors[first][..., :-1].clone()}, f"{first} .* must have shape"),
        (tensors | {first: tensors[first] * torch.nan}, r"finite numbers, got \d+ that are NaN"),
    ):
        lay(folder, case, changed)
        with pytest.raises(UserError, match=message):
            read_foreign(folder)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name in (f"{LENS}standard", f"{DL}AutoEncoder"):
        case = golden(name)
        folder = lay(tmp_path / case["library"], case)
        file = folder / case["weights_file"]
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(CorruptFileError, match=f"{case['weights_file']} is not a whole"):
            read_foreign(folder)
        lay(folder, case)
        (folder / case["config_file"]).write_text("{")
        with pytest.raises(CorruptFileError, match="is not valid JSON"):
            read_foreign(folder)
    torch.save([1, 2], folder / "ae.pt")
    lay_config = golden(f"{DL}AutoEncoder")["config"]
    (folder / "config.json").write_text(str(lay_config).replace("'", '"').replace("None", "null"))
    with pytest.raises(UserError, match="dictionary of tensors in .* got list"):
        read_foreign(folder)


def test_a_folder_of_none_of_the_three(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"files of one library .*sparsify.* got weights\.bin"):
        read_foreign(tmp_path)
    with pytest.raises(UserError, match="Expected the folder of one SAE at .* got nothing"):
        read_foreign(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cfg\.json and sae\.safetensors .* got weights\.bin"):
        read_sparsify(tmp_path)
    lay(tmp_path / "run" / "layers.5" / "seed0", golden("sparsify: topk"))
    lay(tmp_path / "run" / "layers.6", golden("sparsify: topk"))
    with pytest.raises(UserError, match="with SAEs in layers.5/seed0, layers.6: name one"):
        read_foreign(tmp_path / "run")
    assert foreign_format(tmp_path / "run" / "layers.6") == "sparsify"


def test_an_old_scaling_factor_is_dropped_only_where_it_is_one(tmp_path: Path) -> None:
    case = golden(f"{LENS}standard")
    for value in (1.0, 2.0):
        tensors = tensors_of(case) | {"scaling_factor": torch.full((8,), value)}
        folder = lay(tmp_path / "sae", case, tensors)
        if value == 1:
            assert read_sae_lens(folder).sae.d_sae == 8
            continue
        with pytest.raises(UserError, match="scaling_factor of 1"):
            read_sae_lens(folder)


def test_a_logarithm_of_the_threshold_is_undone(tmp_path: Path) -> None:
    case = golden(f"{LENS}jumprelu, training save")
    tensors, wanted = tensors_of(case), expected(case)
    tensors["log_threshold"] = tensors.pop("threshold").log()
    sae = read_sae_lens(lay(tmp_path / "sae", case, tensors)).sae
    torch.testing.assert_close(sae.encode(wanted["x"]), wanted["codes"])


def test_saelens_defaults_stand_in_for_absent_keys(tmp_path: Path) -> None:
    """Its BatchTopK rescales by the decoder norm unless told otherwise, its TopK does not."""
    for name in ("batchtopk, training save", "topk"):
        case = golden(f"{LENS}{name}")
        folder, wanted = lay(tmp_path / name, case), expected(case)
        config = dict(case["config"])
        for key in ("rescale_acts_by_decoder_norm", "apply_b_dec_to_input"):
            del config[key]
        (folder / "cfg.json").write_text(json.dumps(config))
        torch.testing.assert_close(read_sae_lens(folder).sae.encode(wanted["x"]), wanted["codes"])
