"""The check of a conversion: passes what is equal, and finds each way of being wrong."""

import pytest
import torch

from sae_core.interop import ConversionError, Original, check_conversion
from sae_core.interop.checks import compare, probes
from sae_core.sae import SAE, SAEConfig

D_IN, D_SAE = 8, 24


def make(kind: str = "jumprelu", normalize: str = "none") -> SAE:
    generator = torch.Generator().manual_seed(0)
    config = SAEConfig(D_IN, D_SAE, kind=kind, k=4, normalize=normalize)  # type: ignore[arg-type]
    sae = SAE(config, generator=generator)
    sae.b_enc.data = -0.2 * torch.rand(D_SAE, generator=generator)
    sae.b_dec.data = 0.3 * torch.randn(D_IN, generator=generator)
    sae.threshold.data = 0.1 + torch.rand(D_SAE, generator=generator)
    return sae.eval()


def formula(sae: SAE, **changed: torch.Tensor) -> Original:
    """The SAE's own equation in float64, with changed tensors."""
    t = {name: tensor.double() for name, tensor in (sae.tensors() | changed).items()}
    k = sae.config.k

    def encode(x: torch.Tensor) -> torch.Tensor:
        pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        if sae.config.kind == "topk":
            top = pre.topk(k)
            return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        boundary = t["threshold"] if sae.config.kind == "jumprelu" else torch.zeros(())
        return pre * (pre > boundary)

    return Original(encode, lambda acts, x: acts @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "relu"])
def test_an_equal_formula_passes(kind: str) -> None:
    sae = make(kind)
    found = check_conversion(formula(sae), sae, 3 * torch.randn(50, D_IN))
    assert found.codes < 1e-6 and found.reconstruction < 1e-6
    assert found.n_active > 100 and found.n_flips == 0


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_one_wrong_number_is_found(name: str) -> None:
    sae = make()
    changed = sae.tensors()[name].clone()
    changed.view(-1)[5] += 0.05
    with pytest.raises(ConversionError, match=r"differ after the conversion: expected .* got"):
        check_conversion(formula(sae, **{name: changed}), sae)


def test_a_wrong_scale_and_a_wrong_k_are_found() -> None:
    sae, other = make(), make("topk")
    with pytest.raises(ConversionError, match="Codes of random activations"):
        check_conversion(formula(sae, W_enc=sae.W_enc.detach() * 1.0001), sae)
    with pytest.raises(ConversionError, match="Reconstructions of random activations"):
        check_conversion(formula(sae, W_dec=sae.W_dec.detach() * 1.0001), sae)
    right = formula(other)
    object.__setattr__(other.config, "k", 5)
    with pytest.raises(ConversionError, match="Codes of random activations"):
        check_conversion(right, other)


def test_nan_is_a_difference() -> None:
    sae = make()
    right = formula(sae)
    broken = Original(right.encode, lambda acts, x: right.decode(acts, x) * torch.nan)
    with pytest.raises(ConversionError, match="expected nan"):
        check_conversion(broken, sae)


def test_a_difference_on_the_given_activations_alone_is_found() -> None:
    sae = make()
    right = formula(sae)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return right.encode(x) * (1 + (x[:, :1] > 1e6))

    check_conversion(Original(encode, right.decode), sae)
    with pytest.raises(ConversionError, match="the given activations"):
        check_conversion(Original(encode, right.decode), sae, torch.full((3, D_IN), 2e6))


def test_a_latent_at_its_threshold_may_fire_on_one_side_only() -> None:
    sae = make()
    x = torch.randn(1, D_IN)
    pre = sae(x).pre[0]
    latent = int(pre.argmax())
    sae.threshold.data[latent] = pre[latent]  # not above it: silent
    below = sae.threshold.detach().clone()
    below[latent] -= 3e-6  # more than the rounding of a product, less than the tolerance
    found = compare(formula(sae, threshold=below), sae, x)
    assert found.n_flips == 1
    sae.threshold.data[latent] += 1e-2
    with pytest.raises(ConversionError, match="Codes of x"):
        compare(formula(sae, threshold=below), sae, x)


@pytest.mark.parametrize("normalize", ["token", "none"])
def test_every_given_token_is_compared_but_those_that_are_zero(normalize: str) -> None:
    sae = make(normalize=normalize)
    norm = (lambda x: x.norm(dim=1, keepdim=True)) if normalize == "token" else torch.ones_like
    inner = formula(sae)
    right = Original(
        lambda x: inner.encode(x / norm(x)[:, :1]),
        lambda acts, x: inner.decode(acts, x) * norm(x)[:, :1],
    )
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(3))
    x[7] = 0
    found = compare(right, sae, x)
    assert found.n_active == int((sae.encode(x[x.norm(dim=1) > 0]) != 0).sum())
    wrong = Original(lambda x: right.encode(x) * (1 + (x[:, :1] == x_last)), right.decode)
    x_last = x[-1, 0].double()
    with pytest.raises(ConversionError, match="Codes of x"):
        compare(wrong, sae, x)


def test_silence_is_no_proof() -> None:
    sae = make()
    with pytest.raises(ConversionError, match="Expected latents that fire on x, got none on 2"):
        compare(formula(sae), sae, sae.b_dec.detach().expand(2, D_IN))


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "topk", "gba", "batch_topk"])
@pytest.mark.parametrize("normalize", ["token", "none"])
def test_random_activations_make_most_latents_fire(kind: str, normalize: str) -> None:
    sae = make(kind, normalize)
    sae.threshold.data *= 0.5
    fired = (sae.encode(probes(sae)) != 0).any(0)
    assert fired.float().mean() > 0.9
    assert torch.equal(probes(sae), probes(sae))
    assert not torch.equal(probes(sae, seed=1), probes(sae))
