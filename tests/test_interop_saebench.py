"""The adapter for SAEBench: any shape, any order of calls, unit decoder rows; the SAE unchanged."""

import pytest
import torch

from sae_core.interop.saebench import BenchSAE
from sae_core.sae import SAE, SAEConfig

D_IN, D_SAE = 12, 40
FLOAT32 = 1e-5  # sums of at most 41 float32 products in another order


def make(kind: str = "gba", normalize: str = "token") -> SAE:
    generator = torch.Generator().manual_seed(0)
    config = SAEConfig(D_IN, D_SAE, kind=kind, k=5, normalize=normalize)  # type: ignore[arg-type]
    sae = SAE(config, generator=generator)
    sae.b_enc.data = -0.3 * torch.rand(D_SAE, generator=generator)
    sae.b_dec.data = 0.1 * torch.randn(D_IN, generator=generator)
    if kind == "gba":
        sae.scale.data = 0.5 + torch.rand(D_SAE, generator=generator)
    return sae.eval()


def adapted(sae: SAE) -> BenchSAE:
    return BenchSAE(sae, model_name="gpt2", hook_layer=3)


@pytest.mark.parametrize("normalize", ["token", "none"])
@pytest.mark.parametrize("kind", ["gba", "topk", "relu"])
def test_it_reconstructs_what_the_sae_reconstructs(kind: str, normalize: str) -> None:
    sae = make(kind, normalize)
    bench, x = adapted(sae), 7 * torch.randn(2, 5, D_IN)
    wanted = sae.reconstruct(x.reshape(-1, D_IN)).reshape(x.shape)
    torch.testing.assert_close(bench(x), wanted, rtol=FLOAT32, atol=1e-4)
    codes = bench.encode(x)
    added = int(normalize == "token")
    assert codes.shape == (2, 5, D_SAE + added) == (*x.shape[:2], bench.cfg.d_sae)
    own = sae.encode(x.reshape(-1, D_IN)).reshape(2, 5, -1)
    assert torch.equal(codes[..., :D_SAE] != 0, own != 0)
    assert (codes[..., D_SAE:] > 0).all() and codes[..., D_SAE:].numel() == 10 * added


def test_codes_are_decoded_in_any_order_and_number() -> None:
    bench = adapted(make())
    one, two = torch.randn(2, 3, D_IN), 9 * torch.randn(4, D_IN)
    first, second = bench.encode(one), bench.encode(two)
    for x, codes in ((one, first), (two, second), (one, first)):
        torch.testing.assert_close(bench.decode(codes), bench(x))


def test_rows_have_unit_norm_and_a_code_is_the_length_of_its_part() -> None:
    sae = make()
    bench = adapted(sae)
    torch.testing.assert_close(bench.W_dec.norm(dim=1), torch.ones(D_SAE + 1))
    x = 7 * torch.randn(20, D_IN)
    codes = bench.encode(x)
    silenced = codes.clone()
    latent = int(codes[:, :D_SAE].sum(0).argmax())
    silenced[:, latent] = 0
    moved = (bench.decode(codes) - bench.decode(silenced)).norm(dim=1)
    torch.testing.assert_close(moved, codes[:, latent], rtol=1e-4, atol=1e-5)


def test_the_mask_of_an_evaluation_gets_its_gradient() -> None:
    bench = adapted(make())
    codes = bench.encode(torch.randn(6, D_IN))
    mask = torch.ones(codes.shape[1], requires_grad=True)
    bench.decode(codes * mask).sum().backward()
    assert mask.grad is not None and mask.grad.abs().sum() > 0


def test_another_dtype_leaves_the_sae_as_it_was() -> None:
    sae = make()
    before = sae.hash()
    bench = adapted(sae).to(dtype=torch.float64)
    assert bench.dtype == torch.float64 and bench(torch.randn(3, D_IN)).dtype == torch.float64
    assert sae.W_enc.dtype == torch.float32 and sae.hash() == before
    bench.W_dec.mul_(2), bench.b_dec.add_(1)
    assert sae.hash() == before


def test_a_latent_without_a_direction_stays_silent() -> None:
    sae = make()
    sae.scale.data[4] = 0
    bench = adapted(sae)
    torch.testing.assert_close(bench.W_dec.norm(dim=1), torch.ones(D_SAE + 1))
    assert (bench.encode(torch.randn(50, D_IN))[:, 4] == 0).all()


def test_the_configuration_can_be_written_into_and_read_as_json() -> None:
    cfg = adapted(make()).cfg
    assert cfg.hook_name == "blocks.3.hook_resid_post" and cfg.dtype == "float32"
    cfg.context_size = 128
    assert cfg.to_dict()["context_size"] == 128
    other = BenchSAE(make(), model_name="m", hook_layer=1, hook_name="blocks.1.hook_mlp_out").cfg
    assert other.hook_name == "blocks.1.hook_mlp_out" and other.d_sae == D_SAE + 1


def test_the_real_base_class_finds_everything_it_needs() -> None:
    base = pytest.importorskip("sae_bench.custom_saes.base_sae")
    real = base.BaseSAE.__init__.__code__.co_names
    bench = adapted(make())
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "device", "dtype", "cfg"):
        assert name in real and hasattr(bench, name)
    assert base.BaseSAE.check_decoder_norms(bench)
