"""``sae-apps convert`` through main([...]): there and back, on a run, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_apps.tasks.main import main
from sae_core.harvest import harvest_shards
from sae_core.interop import read_sae_lens
from sae_core.models import LanguageModel
from sae_core.sae import SAE, SAEConfig, load_sae, save_sae
from sae_core.text import TextRow
from sae_core.tokens import HarvestConfig
from tests.command import refusal, run_json
from tests.interop_folders import expected, golden, lay

CASE = golden("sae_lens: gated")


def test_a_foreign_sae_becomes_native_and_goes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, wanted = lay(tmp_path / "foreign", CASE), expected(CASE)
    native, back = tmp_path / "native", tmp_path / "back"
    report = run_json(capsys, "convert", str(source), "--out", str(native))
    assert report["from"] == "SAELens" and report["to"] == "native" and report["kind"] == "jumprelu"
    assert any("one JumpReLU" in note for note in report["notes"])
    sae, facts = load_sae(native)
    assert facts["converted_from"] == "sae_lens gated"
    torch.testing.assert_close(sae.encode(wanted["x"]), wanted["codes"])
    run_json(capsys, "convert", str(native), "--to", "sae_lens", "--out", str(back))
    torch.testing.assert_close(read_sae_lens(back).sae.encode(wanted["x"]), wanted["codes"])
    both = tmp_path / "both"
    run_json(capsys, "convert", str(source), "--to", "sae_lens", "--out", str(both))
    torch.testing.assert_close(read_sae_lens(both).sae.encode(wanted["x"]), wanted["codes"])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_given_activations_are_checked_too(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, file = expected(CASE)["x"], tmp_path / f"x{suffix}"
    np.save(file, x.numpy()) if suffix == ".npy" else save_file({"x": x}, file)
    argv = ["convert", str(lay(tmp_path / "sae", CASE)), "--activations", str(file)]
    assert run_json(capsys, *argv, "--out", str(tmp_path / "out"))["checked_on_tokens"] == 6
    assert main([*argv, "--out", str(tmp_path / "text")]) == 0
    assert "and 6 given tokens" in capsys.readouterr().out


def test_a_run_is_checked_on_its_own_activations(
    tiny_lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "lens"
    text = "Tom has 2 dogs and 3 cats. How many pets has he? 5"
    rows = [TextRow(i, text, {}) for i in range(30)]
    held_out = run / "activations" / "held_out"
    harvest_shards(tiny_lm, rows, ["layers.2.out"], held_out, HarvestConfig(), data_id="dogs")
    made = SAE(SAEConfig(64, 128, k=8), generator=torch.Generator().manual_seed(0))
    made.b_enc.data = -0.2 * torch.rand(128)
    made.scale.data = 1 + torch.rand(128)
    facts = {"hook_point": "layers.2.out", "model_id": "stories260k", "freq": [0.25] * 128}
    save_sae(run / "sae", made, facts)
    (run / "run.json").write_text("{}")
    report = run_json(capsys, "convert", str(run), "--to", "sae_lens", "--out", str(out))
    assert report["kind"] == "gba" and report["checked_on_tokens"] > 100
    assert report["hook_point"] == "layers.2.out" and report["model_id"] == "stories260k"
    read = read_sae_lens(out)
    assert read.facts["hook_point"] == facts["hook_point"]
    assert read.facts["freq"] == pytest.approx(facts["freq"], abs=1e-5)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read.sae.encode(x), made.encode(x), rtol=1e-4, atol=1e-5)


def test_a_dry_run_writes_nothing_and_still_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = SAE(SAEConfig(4, 8, k=2))
    save_sae(tmp_path / "native", sae)
    argv = ["convert", str(tmp_path / "native"), "--to", "sae_lens", "--dry-run"]
    assert main(argv) == 0
    assert "nothing was written" in capsys.readouterr().out
    sae.b_enc.data[0] = 0.5
    save_sae(tmp_path / "native", sae, overwrite=True)
    assert "1 latents with biases above 0" in refusal(capsys, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(lay(tmp_path / "sae", CASE)), str(tmp_path / "out")
    save_sae(tmp_path / "native", SAE(SAEConfig(4, 8, k=2)))
    np.save(tmp_path / "wide.npy", np.zeros((3, 5), np.float32))
    np.save(tmp_path / "nan.npy", np.full((3, 4), np.nan, np.float32))
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    native = ["convert", str(tmp_path / "native")]
    for argv, message in (
        (["convert", "--out", out], "Expected the folder of an SAE and --out"),
        (["convert", source], "Expected the folder of an SAE and --out"),
        (["convert", str(tmp_path), "--out", out], "with SAEs in sae: name one"),
        (["convert", out, "--out", out], "got nothing"),
        ([*native, "--out", out], "is native already: expected --to sae_lens"),
        (["convert", source, "--out", source], "already holds files"),
        (["convert", source, "--to", "gguf", "--out", out], "'native', 'sae_lens', got 'gguf'"),
    ):
        assert message in refusal(capsys, *argv)
    for name, message in (
        ("gone.npy", "got nothing"), ("wide.npy", "[n, d_in=4]"), ("nan.npy", "finite"),
        ("x.npy", "cannot be read"),
    ):  # fmt: skip
        more = ["--activations", str(tmp_path / name), "--to", "sae_lens", "--out", out]
        assert message in refusal(capsys, *native, *more)
    assert not Path(out).exists()
