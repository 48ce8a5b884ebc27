"""Triton kernels against dense references; in the interpreter where there is no GPU.

Small whole numbers keep products exact in every type, so that active sets are compared as they are
and a value that equals its bound, the kink, is met often.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="triton (extra gpu) is not installed")

from sae_core import step
from sae_core.gba import GBAConfig
from sae_core.kernels import autograd, choice, eager, sparse, triton_entries, triton_products
from sae_core.kernels import triton as kernels
from sae_core.kernels.adam import Adam
from sae_core.kernels.codes import Codes, codes_where
from sae_core.kernels.triton_bits import Tiles, dense_bits, product_bits
from sae_core.kernels.triton_entries import codes_from_bits, entries_of_bits, keep_above
from sae_core.loss import SparsityConfig
from sae_core.reweighting import WeightConfig
from sae_core.sae import SAE, SAEConfig
from sae_core.start import start
from sae_core.train import TrainConfig, TrainState, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RTOL64 = 1e-10  # float64 sums of at most 60 terms, in another order
RTOL32 = 1e-5  # float32, likewise
SMALL = Tiles(tokens=16, latents=32, depth=16, group=2, warps=4, stages=2)


def whole(*shape: int, seed: int = 0, most: int = 2, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(DEVICE, dtype)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE)


def words_of(active: torch.Tensor) -> torch.Tensor:
    """The int32 words of a truth table, by Python's own integers."""
    padded = torch.nn.functional.pad(active.long().cpu(), (0, -active.shape[1] % 32))
    powers = 2 ** torch.arange(32)
    words = (padded.reshape(len(active), -1, 32) * powers).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int().to(DEVICE)


def some_codes(n: int = 5, d_sae: int = 17, density: float = 0.1, seed: int = 3) -> Codes:
    """Random codes; the second token and most latents are silent, the third latent is not."""
    active = torch.rand(n, d_sae, generator=torch.Generator().manual_seed(seed)) < density
    active[:, 2] = True
    active[1] = False
    return codes_where(active.to(DEVICE), normal(n, d_sae, seed=seed))


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU tensors go the way of CUDA tensors; the list names the kernels asked for."""
    asked: list[str] = []
    spied = ModuleType("spied")

    def spy(name: str) -> None:
        def called(*args, **more):
            asked.append(name)
            return getattr(kernels, name)(*args, **more)

        setattr(spied, name, called)

    for name in set(kernels.__all__) - {"MOST_COLUMNS"}:
        spy(name)
    spied.MOST_COLUMNS = kernels.MOST_COLUMNS
    for module in (sparse, step):
        monkeypatch.setattr(module, "kernels", lambda tensor: spied)
        monkeypatch.setattr(module, "products", lambda tensor, d_sae: spied)
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 1.0)
    return asked


# ---- bits ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n, d, m", [(1, 1, 1), (19, 21, 77), (40, 32, 64)])
def test_bits_of_both_routes_are_the_entries_above_the_bound(n, d, m, dtype):
    x, w = whole(n, d, dtype=dtype), whole(m, d, seed=1, dtype=dtype).T
    bound = whole(m, seed=2, most=6)
    pre = x.float() @ w.float()
    assert n == 1 or (pre == bound).any(), "control: the kink is met"
    expected = words_of(pre > bound)
    assert torch.equal(product_bits(x, w, bound, SMALL), expected)
    assert torch.equal(dense_bits(pre.to(dtype), bound), expected)


def test_the_library_route_goes_through_the_tokens_in_parts(monkeypatch):
    monkeypatch.setattr(kernels, "DENSE_BYTES", 3 * 40 * 4)  # three tokens
    x, w, bound = whole(8, 5), whole(40, 5, seed=1).T, whole(40, seed=2)
    assert torch.equal(
        kernels.active_bits(x, w, bound, fused=False), words_of(x @ w > bound)
    )


def test_no_tokens_have_no_codes():
    x, w = torch.zeros(0, 4, device=DEVICE), whole(9, 4).T
    zeros = torch.zeros(9, device=DEVICE)
    codes = kernels.active_codes(x, w, zeros, None, torch.float32, 5)
    assert codes.n == 0 and codes.col.shape == (0,)
    assert kernels.matmul(codes, whole(9, 4)).shape == (0, 4)
    assert torch.equal(kernels.matmul_t(codes, x), torch.zeros(9, 4, device=DEVICE))


# ---- entries ----


@pytest.mark.parametrize("width", [2, 2048], ids=["in pieces", "whole rows"])
def test_entries_come_by_token_then_by_latent(width, monkeypatch):
    monkeypatch.setattr(triton_entries, "WORDS", width)
    active = torch.zeros(4, 150, dtype=torch.bool, device=DEVICE)
    active[0, [0, 1, 31, 32, 63, 64, 149]] = True  # the edges of words, and a sign bit
    active[2] = True
    active[3, 95] = True
    bits = words_of(active)
    crow = triton_entries.row_starts_of_bits(bits)
    assert crow.tolist() == [0, 7, 7, 157, 158]
    row, col = entries_of_bits(bits, crow, 160)
    expected = active.nonzero(as_tuple=True)
    assert torch.equal(row[:158], expected[0]) and torch.equal(col[:158], expected[1])
    assert not row[158:].any() and not col[158:].any()
    row, col = entries_of_bits(bits, crow, 9)  # the first nine, and nothing written behind
    assert torch.equal(row, expected[0][:9]) and torch.equal(col, expected[1][:9])


@pytest.mark.parametrize("low", [None, 0.5])
@pytest.mark.parametrize("room", [0, 1, 7, 200])
def test_more_entries_than_reserved_are_all_there(room, low):
    active = torch.rand(6, 70, generator=torch.Generator().manual_seed(0)) < 0.2
    pre = normal(6, 70, seed=1).float()
    expected = codes_where(active.to(DEVICE), pre)
    if low is not None:
        expected = expected.keep(expected.values > low)
    rooms = []

    def values(codes: Codes) -> torch.Tensor:
        rooms.append(codes.col.shape[0])
        return pre[codes.row, codes.col]

    codes = codes_from_bits(words_of(active), 70, room, values, low)
    for got, wanted in zip(codes[:4], expected[:4], strict=True):
        assert torch.equal(got, wanted)
    assert rooms == ([room, int(active.sum())] if room < active.sum() else [room])


def test_what_equals_the_bound_is_not_kept_and_unused_places_do_not_count(monkeypatch):
    monkeypatch.setattr(triton_entries, "SLOTS", 2)
    crow = torch.tensor([0, 3, 3, 5], device=DEVICE)
    row = torch.tensor([0, 0, 0, 2, 2, 0, 0], device=DEVICE)
    col = torch.tensor([1, 4, 8, 0, 5, 7, 7], device=DEVICE)
    values = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0, 9.0, 9.0], device=DEVICE)
    kept = keep_above(Codes(crow, row, col, values, 9), 0.5)
    assert kept.crow.tolist() == [0, 2, 2, 3]
    assert kept.row[:3].tolist() == [0, 0, 2] and kept.col[:3].tolist() == [4, 8, 5]
    assert kept.values[:3].tolist() == [1.0, 2.0, 3.0]


# ---- codes ----


@pytest.mark.parametrize("given", [False, True], ids=["zero", "threshold"])
def test_codes_are_those_of_the_dense_pre_activations(given):
    x, w, b = whole(9, 5), whole(41, 5, seed=1).T, whole(41, seed=2, most=6) - 4.0
    threshold = whole(41, seed=3).abs() if given else None
    pre = x @ w + b
    expected = codes_where(pre > (0 if threshold is None else threshold), pre)
    assert 0 < expected.density < 0.5
    codes = kernels.active_codes(x, w, b, threshold, torch.float32, 4)
    for got, wanted in zip(codes[:4], expected[:4], strict=True):
        assert torch.equal(got, wanted)
    assert codes.by_latent is not None
    counts = torch.bincount(expected.col, minlength=41)
    assert torch.equal(codes.by_latent.starts.diff(), counts)
    assert torch.equal(codes.col[codes.by_latent.order], expected.col.sort(stable=True).values)


def test_too_many_entries_are_left_to_the_dense_products():
    x, w = torch.ones(2, 1, device=DEVICE), torch.ones(1, 3, device=DEVICE)
    arguments = (x, w, torch.zeros(3, device=DEVICE), None, torch.float32, 4)
    assert kernels.active_codes(*arguments, most=5.0) is None
    codes = kernels.active_codes(*arguments, most=6.0)
    assert codes is not None and codes.col.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_dense_batch_trains_by_dense_products(on_triton, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 0.1)
    _, _, records = trained("relu")
    assert records[-1].l0 > 0.1 * 10
    assert set(on_triton) == {"active_codes", "adam_unit_rows"}


def test_the_exact_value_decides_what_bfloat16_only_found():
    # 1.004 rounds to 1.0078 in bfloat16: above 1.006 there, below it in truth
    x, w = torch.tensor([[1.004]], device=DEVICE), torch.ones(1, 2, device=DEVICE)
    b = torch.tensor([-1.006, -0.5], device=DEVICE)
    arguments = (x, w, b, None, torch.bfloat16, 4)
    found = kernels.active_codes(*arguments, low=None)
    assert found.col.tolist() == [0, 1]
    torch.testing.assert_close(found.values, torch.tensor([-0.002, 0.504], device=DEVICE))
    assert kernels.active_codes(*arguments).col.tolist() == [1]


# ---- products ----


@pytest.mark.parametrize("d, piece", [(1, 1), (21, 2), (32, 256)])
def test_products_equal_the_dense_references(d, piece, monkeypatch):
    monkeypatch.setattr(triton_products, "PIECE", piece)
    monkeypatch.setattr(triton_products, "COLUMNS", 16)
    codes, w, g = some_codes(), normal(17, d, seed=1), normal(5, d, seed=2)
    close = {"rtol": RTOL64, "atol": RTOL64}
    torch.testing.assert_close(kernels.matmul(codes, w), eager.matmul(codes, w), **close)
    biased = kernels.matmul(codes, w, g[0])
    torch.testing.assert_close(biased, eager.matmul(codes, w) + g[0], **close)
    torch.testing.assert_close(kernels.matmul_t(codes, g), eager.matmul_t(codes, g), **close)
    torch.testing.assert_close(kernels.sampled(codes, g, w), eager.sampled(codes, g, w), **close)


def test_half_precision_operands_are_summed_in_float32():
    codes, w, g = some_codes(), normal(17, 21, seed=1).bfloat16(), normal(5, 21, seed=2).bfloat16()
    codes = codes.with_values(codes.values.float())
    close = {"rtol": RTOL32, "atol": RTOL32}
    pairs = [
        (kernels.matmul(codes, w), eager.matmul(codes, w.float())),
        (kernels.matmul_t(codes, g), eager.matmul_t(codes, g.float())),
        (kernels.sampled(codes, g, w), eager.sampled(codes, g.float(), w.float())),
    ]
    for got, wanted in pairs:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, **close)


def test_gradients_of_encoder_and_decoder(on_triton):
    codes = some_codes(4, 9, 0.3)
    inputs = tuple(
        normal(*shape, seed=seed).requires_grad_()
        for seed, shape in enumerate([(4, 3), (3, 9), (9,), (3,), (9,), (9, 3)])
    )

    def run(x, w_enc, b_enc, b_dec, scale, w_dec):
        pre = ((x - b_dec) @ w_enc + b_enc).detach()
        active = codes.with_values(pre[codes.row, codes.col])
        coded = autograd.encode(x, w_enc, b_enc, b_dec, active)
        scaled = coded.with_values(coded.values * autograd.lookup(scale, coded))
        return coded.values, autograd.decode(scaled, w_dec)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert {"matmul", "matmul_t", "sampled"} <= set(on_triton)

    def dense(x, w_enc, b_enc, b_dec, scale, w_dec):
        on = codes.with_values(torch.ones_like(codes.values)).to_dense()
        pre = ((x - b_dec) @ w_enc + b_enc) * on
        return pre[codes.row, codes.col], (pre * scale) @ w_dec

    weights = normal(len(codes.col), seed=8), normal(4, 3, seed=9)
    for function in (run, dense):
        outputs = function(*inputs)
        total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        found = torch.autograd.grad(total, inputs)
        expected = found if function is run else expected
    torch.testing.assert_close(found, expected, rtol=RTOL64, atol=RTOL64)


@pytest.mark.parametrize("weighted", [False, True])
def test_fused_loss_and_its_gradients_are_those_of_the_formula(weighted):
    codes, squared = some_codes(), normal(11, seed=7).square() if weighted else None
    inputs = tuple(
        t.requires_grad_()
        for t in (codes.values.clone(), normal(17, 11), normal(11, seed=1), normal(5, 11, seed=2))
    )

    def run(values, w_dec, b_dec, x):
        return kernels.reconstruction(codes.with_values(values), w_dec, b_dec, x, 0.3, squared)

    def dense(values, w_dec, b_dec, x):
        x_hat = eager.matmul(codes.with_values(values), w_dec) + b_dec
        return 0.3 * ((x_hat - x).square() * (1 if squared is None else squared)).sum(), x_hat

    results = []
    for function in (run, dense):
        loss, x_hat = function(*inputs)
        results.append((loss.detach(), x_hat.detach(), *torch.autograd.grad(2 * loss, inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=RTOL64, atol=RTOL64)
    assert torch.autograd.gradcheck(lambda *args: run(*args)[0], inputs, fast_mode=True)


def test_the_fused_update_is_adam_and_then_unit_norm():
    runs = []
    for fused in (False, True):
        parameter = torch.nn.Parameter(normal(7, 21))
        other = torch.nn.Parameter(normal(3))
        optimizer = Adam([{"params": [other]}, {"params": [parameter]}], lr=0.1)
        for seed in range(3):
            parameter.grad = normal(7, 21, seed=seed)
            other.grad = normal(3, seed=seed)
            if fused and seed != 1:  # the plain step in between, on the same moments
                kernels.adam_unit_rows(optimizer, parameter)
                assert parameter.grad is None
            optimizer.step()
            if not fused or seed == 1:
                parameter.data /= parameter.data.norm(dim=1, keepdim=True)
        runs.append((parameter.detach(), other.detach(), *optimizer.state[parameter].values()))
    # the rates reach the kernel in float32
    torch.testing.assert_close(runs[1], runs[0], rtol=RTOL32, atol=1e-7)


# ---- the training step ----


def trained(
    kind: str, precision: str = "float32", weights: str = "none", **more
) -> tuple[SAE, TrainState, list]:
    """Two steps on the same 4 tokens of width 5 with 10 latents: interpreted programs are slow."""
    config = TrainConfig(
        steps=2, batch_size=4, log_every=2, lr=0.01, precision=precision,
        gba=GBAConfig(2, 0.3, 0.1, calibrate_tokens=0), weights=WeightConfig(kind=weights),
        sparsity=SparsityConfig(dead_after_tokens=1, bandwidth=2.0),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(5, 10, kind=kind, k=2, **more), generator=generator).to(DEVICE)
    sae = sae if "topk" in kind else sae.double()  # those two rank in float32
    # the thresholds start at values of the first tokens: other ones, so that no value equals one
    state = start(sae, normal(64, 5, seed=2), config)
    return sae, state, list(train(sae, [normal(4, 5, seed=1)] * 2, config, state))


@pytest.mark.parametrize(
    "kind, precision, more",
    [
        ("gba", "float32", {}),
        ("gba", "bfloat16", {"gate": "relu"}),
        ("gba", "float32", {"tied": True}),
        ("jumprelu", "float32", {"weights": "variance"}),
        ("relu", "float32", {}),
        ("topk", "float32", {}),
        ("batch_topk", "bfloat16", {"weights": "variance"}),
    ],
)
def test_training_is_that_of_the_present_path(kind, precision, more, request, monkeypatch):
    for module in (sparse, step):
        monkeypatch.setattr(module, "kernels", lambda tensor: None)
        monkeypatch.setattr(module, "products", lambda tensor, d_sae: None)
    sae, state, records = trained(kind, precision, **more)
    monkeypatch.undo()
    asked = request.getfixturevalue("on_triton")
    fused_sae, fused_state, fused_records = trained(kind, precision, **more)
    assert {"reconstruction", "matmul_t", "adam_unit_rows"} <= set(asked)
    assert ("active_codes" in asked) == ("topk" not in kind)
    assert torch.equal(state.tokens_since, fused_state.tokens_since)
    assert records[-1].l0 == fused_records[-1].l0 > 0
    # float64, but for the rates, which reach the kernel of the update in float32
    close = {"rtol": 1e-3, "atol": 1e-4} if "topk" in kind else {"rtol": 1e-7, "atol": 1e-8}
    assert fused_records[-1].fvu == pytest.approx(records[-1].fvu, rel=close["rtol"])
    for name, tensor in sae.tensors().items():
        torch.testing.assert_close(fused_sae.tensors()[name], tensor, **close)


# ---- which implementation runs ----


def test_cpu_tensors_go_the_present_way():
    assert choice.kernels(torch.zeros(1)) is None
    assert choice.triton_kernels() is kernels


@pytest.mark.parametrize(
    "missing, is_passed_over",
    [("triton", True), ("triton.language", True), ("sae_core.kernels.triton", False)],
)
def test_only_the_absence_of_triton_is_passed_over(missing, is_passed_over, monkeypatch):
    def fail(name: str):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(choice, "import_module", fail)
    uncached = choice.triton_kernels.__wrapped__
    if is_passed_over:
        assert uncached() is None
    else:
        with pytest.raises(ModuleNotFoundError):
            uncached()


# ---- compiled, without a GPU ----


def compile_for_hopper() -> None:
    """Compile every kernel for an H100 at d 2,048 and 65,536 latents; nothing runs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Hopper:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)

    compiled = JITFunction.run

    def compile_only(self, *args, grid, warmup, **more):
        kernel = compiled(self, *args, grid=grid, warmup=True, **more)
        local = len(re.findall(r"\.local", kernel.asm["ptx"]))
        print(self.fn.__name__, kernel.asm["ptx"].count("wgmma.mma_async"), local)

    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only
    n, d, m, room = 16, 2048, 65536, 512
    x, w, b = torch.empty(n, d), torch.empty(m, d, dtype=torch.bfloat16), torch.empty(m)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(torch.Tensor, "is_cuda", True)  # as on the GPU, no operand is widened
    product_bits(x.bfloat16(), w.T, b)
    product_bits(x, w[:64].float().T, b[:64])
    monkey.undo()
    dense_bits(torch.empty(n, m, dtype=torch.bfloat16), b)
    bits = torch.empty(n, m // 32, dtype=torch.int32)
    triton_entries.row_starts_of_bits(bits)
    index = torch.zeros(room, dtype=torch.int64)
    codes = Codes(torch.zeros(n + 1, dtype=torch.int64), index, index, torch.empty(room), 64)
    entries_of_bits(bits, codes.crow, room)
    keep_above(codes, 0.0)
    kernels.matmul(codes, w[:64], b[:d])
    kernels.sampled(codes, x, w[:64].float())
    kernels.matmul_t(codes, x)
    kernels.reconstruction(codes, w[:64], b[:d], x, 1.0)
    matrix = torch.nn.Parameter(x)
    matrix.grad = x
    kernels.adam_unit_rows(Adam([{"params": [matrix]}]), matrix)


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile them for this GPU")
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 13, run.stdout
    assert int(lines[0][1]) > 0, "the bfloat16 product must run on Hopper's tensor cores"
    assert all(int(local) == 0 for _, _, local in lines), "registers spilt to memory"


if __name__ == "__main__":
    compile_for_hopper()
