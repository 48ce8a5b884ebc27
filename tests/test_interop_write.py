"""What is written for SAELens: its formula, its files, what it cannot say."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_core.errors import UserError
from sae_core.interop import ConversionError, read_sae_lens, saelens_write, write_sae_lens
from sae_core.sae import SAE, SAEConfig
from sae_core.store import verify_folder

D_IN, D_SAE = 12, 40
FLOAT32 = 1e-5  # sums of at most 40 float32 products in another order
FORMS = [
    ("gba", {}), ("gba", {"gate": "relu"}), ("gba", {"tied": True}), ("gba", {"normalize": "none"}),
    ("topk", {}), ("topk", {"normalize": "none"}), ("batch_topk", {}), ("jumprelu", {}),
    ("relu", {"normalize": "none"}),
]  # fmt: skip


def make(kind: str, **more) -> SAE:
    generator = torch.Generator().manual_seed(0)
    config = SAEConfig(D_IN, D_SAE, kind=kind, k=5, **more)  # type: ignore[arg-type]
    sae = SAE(config, generator=generator)
    sae.b_enc.data = -0.3 * torch.rand(D_SAE, generator=generator)
    sae.b_dec.data = 0.1 * torch.randn(D_IN, generator=generator)
    sae.threshold.data = 0.3 * torch.rand(D_SAE, generator=generator)
    if kind == "gba":
        sae.scale.data = 0.5 + torch.rand(D_SAE, generator=generator)
    return sae.eval()


def tokens(n: int = 30) -> torch.Tensor:
    return 7 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "more"), FORMS)
def test_the_files_say_in_saelens_formula_what_the_sae_computes(
    kind: str, more: dict, tmp_path: Path
) -> None:
    sae, x = make(kind, **more), tokens()
    write_sae_lens(sae, tmp_path / "out", x=x)
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    t = load_file(tmp_path / "out" / "sae_weights.safetensors")
    # sae_lens/saes/sae.py: process_sae_in, constant_norm_rescale, and encode of the three classes
    is_token = sae.config.normalize == "token"
    assert config["normalize_activations"] == ("constant_norm_rescale" if is_token else "none")
    coefficient = D_IN**0.5 / x.norm(dim=-1, keepdim=True) if is_token else 1.0
    pre = (x * coefficient - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = pre.relu()
    if config["architecture"] == "topk":
        top = pre.topk(config["k"], dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    elif config["architecture"] == "jumprelu":
        acts = acts * (pre > t["threshold"])
    x_hat = (acts @ t["W_dec"] + t["b_dec"]) / coefficient
    torch.testing.assert_close(acts, sae.encode(x), rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(x_hat, sae.reconstruct(x), rtol=FLOAT32, atol=1e-4)
    assert all(tensor.is_contiguous() for tensor in t.values())


@pytest.mark.parametrize(
    ("kind", "more", "architecture", "back"),
    [
        ("gba", {}, "jumprelu", "jumprelu"), ("gba", {"gate": "relu"}, "standard", "relu"),
        ("topk", {}, "topk", "topk"), ("batch_topk", {}, "jumprelu", "jumprelu"),
        ("jumprelu", {}, "jumprelu", "jumprelu"), ("relu", {}, "standard", "relu"),
    ],
)  # fmt: skip
def test_written_and_read_is_the_same_function(
    kind: str, more: dict, architecture: str, back: str, tmp_path: Path
) -> None:
    sae, x = make(kind, **more), tokens()
    write_sae_lens(sae, tmp_path / "out")
    assert json.loads((tmp_path / "out/cfg.json").read_text())["architecture"] == architecture
    again = read_sae_lens(tmp_path / "out").sae
    assert again.config.kind == back and again.config.normalize == sae.config.normalize
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(again.reconstruct(x), sae.reconstruct(x), rtol=FLOAT32, atol=1e-4)


def test_the_notes_say_what_was_folded(tmp_path: Path) -> None:
    notes = write_sae_lens(make("gba", tied=True), tmp_path / "a", {"hook_point": "lm_head.in"})
    for part in ("became thresholds", "scale was multiplied", "two matrices", "decode takes each"):
        assert any(part in note for note in notes), part
    assert any("no name for lm_head.in" in note for note in notes)
    assert write_sae_lens(make("topk", normalize="none"), tmp_path / "b") == ()


def test_metadata_and_firing_rates(tmp_path: Path) -> None:
    sae = make("gba")
    freq = [0.0, 0.25] + [1.0] * (D_SAE - 2)
    facts = {"model_id": "gpt2", "hook_point": "layers.3.in", "freq": freq, "taf": [1.0]}
    write_sae_lens(sae, tmp_path / "out", facts)
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.3.hook_resid_pre" and metadata["model_name"] == "gpt2"
    assert metadata["sae_apps_hash"] == sae.hash()
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6  # else read as an old format
    sparsity = load_file(tmp_path / "out" / "sparsity.safetensors")["sparsity"]
    assert sparsity[:3].tolist() == pytest.approx([-10, math.log10(0.25), 0], abs=1e-5)
    read = read_sae_lens(tmp_path / "out").facts
    assert read["hook_point"] == "layers.3.in" and read["freq"][:3] == pytest.approx(freq[:3])


def test_negative_codes_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    sae = make("gba")
    sae.b_enc.data[:3] = 0.2
    x = tokens()
    assert (sae.encode(x) < 0).any(), "control: such a latent fires with a negative code"
    with pytest.raises(UserError, match="got 3 latents with biases above 0"):
        write_sae_lens(sae, tmp_path / "out")
    sae = make("jumprelu")
    sae.threshold.data[0] = -0.1
    with pytest.raises(UserError, match="got 1 latents with thresholds below 0"):
        write_sae_lens(sae, tmp_path / "out")
    relu = make("gba", gate="relu")
    relu.b_enc.data[:3] = 0.2  # there the code is max(pre, 0)
    write_sae_lens(relu, tmp_path / "relu")
    assert os.listdir(tmp_path) == ["relu"]


def test_an_sae_in_training_mode_is_written_as_it_infers(tmp_path: Path) -> None:
    sae = make("batch_topk").train()
    write_sae_lens(sae, tmp_path / "out")
    x = tokens()
    assert sae.training and not torch.equal(sae.encode(x), sae.eval().encode(x)), "control"
    torch.testing.assert_close(read_sae_lens(tmp_path / "out").sae.encode(x), sae.encode(x))


def test_a_mismatch_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = saelens_write.lens_tensors

    def wrong(sae: SAE) -> tuple:
        architecture, tensors, notes = right(sae)
        return architecture, tensors | {"threshold": tensors["threshold"] * 1.01}, notes

    monkeypatch.setattr(saelens_write, "lens_tensors", wrong)
    with pytest.raises(ConversionError, match="Codes of .* differ after the conversion"):
        write_sae_lens(make("gba"), tmp_path / "out", x=tokens(3000))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_taken_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds files"):
        write_sae_lens(make("topk"), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine.txt"]
    write_sae_lens(make("topk"), tmp_path / "new")
    before = (tmp_path / "new" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(UserError, match="already holds files"):
        write_sae_lens(make("relu"), tmp_path / "new")
    assert (tmp_path / "new" / "sae_weights.safetensors").read_bytes() == before
    write_sae_lens(make("relu"), tmp_path / "new", overwrite=True)
    assert set(verify_folder(tmp_path / "new")["files"]) == {"cfg.json", "sae_weights.safetensors"}
