"""The Triton kernels against dense references on the card that is about to be timed.

`check` ends the program where a kernel is off, so that no time of a wrong result is reported.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from sae_core import step as step_module
from sae_core.demand import asks, follow_demand
from sae_core.kernels import choice, eager, sparse
from sae_core.kernels.codes import Codes, codes_where
from sae_core.sae import SAE, SAEConfig
from sae_core.start import start
from sae_core.state import TrainConfig
from sae_core.step import bias_step, count_firing, gradient_step

DEVICE = "cuda"
SIZE = (777, 520, 3001)  # tokens, width, latents: nothing divides them
LATENTS = 2048  # of the training that is compared
ERROR = 1e-4  # relative: float32 sums of up to a few thousand terms in another order


def planted(n: int, d_in: int, seed: int = 0) -> Tensor:
    """Tokens [n, d_in] on the GPU: sums of 32 of 4 d_in directions, and noise."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    directions = torch.randn(4 * d_in, d_in, device=DEVICE, generator=generator)
    on = torch.randint(4 * d_in, (n, 32), device=DEVICE, generator=generator)
    x = torch.zeros(n, d_in, device=DEVICE)
    for column in on.T:
        x += directions[column]
    return x + 0.1 * torch.randn(n, d_in, device=DEVICE, generator=generator)


def check() -> None:
    """Every kernel against its dense reference; ends with status 1 where one is off."""
    fast = choice.triton_kernels()
    assert fast is not None
    torch.backends.cuda.matmul.allow_tf32 = False
    n, d, m = SIZE
    x, w = planted(n, d) / d**0.5, torch.randn(m, d, device=DEVICE)
    w /= w.norm(dim=1, keepdim=True)
    bias = torch.full((m,), -2.0, device=DEVICE) + 0.1 * torch.randn(m, device=DEVICE)
    exact = x.double() @ w.double().T + bias
    for dtype, slack in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        for fused in (True, False):
            for room in (4 * n, 10**6):
                codes = fast.active_codes(x, w.T, bias, None, dtype, room, fused=fused)
                found = codes.with_values(torch.ones_like(codes.values)).to_dense() > 0
                wrong = (found != (exact > 0)) & (exact.abs() > slack)
                expect(f"active set {dtype} fused={fused}", float(wrong.sum()), 0.0)
                values = exact[codes.row, codes.col].float()
                expect(f"values {dtype}", distance(codes.values, values), ERROR)
    codes = fast.active_codes(x, w.T, bias, None, torch.float32, 10**6)
    reference = codes_where(codes.to_dense() > 0, codes.to_dense())
    expect("order of the codes", float((codes.col != reference.col).sum()), 0.0)
    g = torch.randn(n, d, device=DEVICE)
    double = codes.with_values(codes.values.double())
    gd, wd = g.double(), w.double()
    expect("matmul", distance(fast.matmul(codes, w), eager.matmul(double, wd)), ERROR)
    expect("matmul_t", distance(fast.matmul_t(codes, g), eager.matmul_t(double, gd)), ERROR)
    expect("sampled", distance(fast.sampled(codes, g, w), eager.sampled(double, gd, wd)), ERROR)
    same = torch.equal(fast.matmul_t(codes, g), fast.matmul_t(codes, g))
    expect("two runs of matmul_t differ", float(not same), 0.0)
    check_training(x)


@contextmanager
def running(fast: ModuleType | None) -> Iterator[None]:
    """Training steps with the given kernels, or without any, while the block runs."""
    with (
        patch.object(step_module, "kernels", lambda _: fast),
        patch.object(sparse, "kernels", lambda _: fast),
    ):
        yield


def prepared(
    x: Tensor, d_sae: int, k: int, precision: str
) -> tuple[SAE, Callable[[], tuple[Tensor, Tensor, Codes]]]:
    """A gba SAE whose thresholds are set, and a closure that does one whole step on x."""
    config = TrainConfig(steps=100_000, batch_size=len(x), precision=precision)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(x.shape[1], d_sae, kind="gba", k=k), generator=generator).to(DEVICE).train()
    state = start(sae, x[:4096], config)

    def step() -> tuple[Tensor, Tensor, Codes]:
        u, _ = sae.normalise(x)
        codes, u_hat = gradient_step(sae, u, state, config, 1e-4)
        count_firing(sae, codes, state, config)
        if asks(state, config):
            follow_demand(sae, u, state, config)
        bias_step(sae, state, config.gba)
        return u, u_hat, codes

    return sae, step


def check_training(x: Tensor) -> None:
    """Ten steps with the kernels against ten without, from the same start."""
    results = []
    for fast in (choice.triton_kernels(), None):
        with running(fast):
            sae, step = prepared(x, LATENTS, 16, "float32")
            errors = []
            for _ in range(10):
                u, u_hat, _ = step()
                errors.append(float((u_hat - u).square().mean()))
        results.append((torch.tensor(errors), sae.W_dec.detach().clone()))
    expect("error of ten steps", distance(results[0][0], results[1][0]), 1e-2)
    expect("decoder after ten steps", distance(results[0][1], results[1][1]), 1e-1)


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def expect(what: str, value: float, most: float) -> None:
    """Print a check and end the program where it fails."""
    print(f"check {what}: {value:.2e} (at most {most:.0e})", flush=True)
    if not value <= most:
        sys.exit(f"Expected {what} to be off by at most {most}, got {value}: no timing was done.")
