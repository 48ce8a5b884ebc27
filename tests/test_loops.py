"""The compiled loops of a step against dense references and torch's own kernels."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_core.kernels import active, adam, autograd, choice, compiled, eager, sparse
from sae_core.kernels.adam import Adam
from sae_core.kernels.codes import codes_where
from sae_core.nonlinearity import batch_topk, topk
from sae_core.sae import SAE, SAEConfig
from sae_core.start import start
from sae_core.state import TrainConfig
from sae_core.step import gradient_step

if not compiled.has_threads():
    pytest.skip("needs numba with threads of OpenMP or TBB", allow_module_level=True)

from sae_core.kernels import cpu, screen

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}  # sums of at most 60 terms, in another order


@pytest.fixture
def everywhere(monkeypatch):
    """Compiled loops for matrices of any size."""
    monkeypatch.setattr(choice, "LARGE", 0)


def problem(n: int, d_sae: int, d: int, density: float, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    codes = codes_where(torch.rand(n, d_sae, generator=generator) < density, normal(n, d_sae))
    return codes, normal(d_sae, d), normal(n, d), normal(d)


@given(
    st.integers(1, 9), st.integers(1, 30), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99),
    st.sampled_from(list(CLOSE)),
)  # fmt: skip
def test_products_equal_the_references(n, d_sae, d, density, seed, dtype):
    codes, w, g, _ = problem(n, d_sae, d, density, dtype, seed)
    close = {"rtol": CLOSE[dtype], "atol": 10 * CLOSE[dtype]}
    torch.testing.assert_close(cpu.matmul(codes, w), eager.matmul(codes, w), **close)
    torch.testing.assert_close(cpu.sampled(codes, g, w), eager.sampled(codes, g, w), **close)
    for same in (codes, codes.grouped()):
        torch.testing.assert_close(cpu.matmul_t(same, g), eager.matmul_t(codes, g), **close)
    transposed = g.T.contiguous().T  # any strides
    torch.testing.assert_close(cpu.matmul_t(codes, transposed), eager.matmul_t(codes, g), **close)


def test_an_unknown_latent_or_token_is_an_error_and_no_crash():
    codes, w, g, bias = problem(4, 9, 3, 0.5)
    for col in (codes.col + 10_000_000, codes.col - 9):
        other = codes._replace(col=col)
        for call in (
            lambda c: cpu.matmul(c, w),
            lambda c: cpu.sampled(c, g, w),
            lambda c: cpu.reconstruction(c, w, bias, g, 1.0),
        ):
            call(codes)
            with pytest.raises(IndexError, match="from 0 to 8"):
                call(other)
    for call in (cpu.matmul_t, lambda c, x: cpu.sampled(c, x, w)):
        with pytest.raises(IndexError, match="each of 4 tokens, got 3"):
            call(codes, g[:3])


def test_the_sign_of_a_zero_floor_is_no_matter():
    matrix = -1 - torch.rand(64, 1100)
    matrix[:, :8], matrix[:, 8:108] = 1.0, -0.0
    row, col = cpu.above(matrix, torch.tensor(-0.0))
    assert len(row) == 64 * 8 and col.max() == 7
    for ranked in (matrix, matrix.repeat(16, 1)):  # by torch's kernels and by the loops
        assert batch_topk(ranked, 32).values.min() == 1


def test_places_are_found_in_a_slice(monkeypatch):
    monkeypatch.setattr(choice, "LARGE", 1 << 62)  # by torch, which reads eight bytes at a time
    matrix = torch.zeros(9, 12, dtype=torch.uint8)
    matrix[2, 5] = 1
    row, col = active.above(matrix[1:3])
    assert (row.tolist(), col.tolist()) == ([1], [5])


@pytest.mark.parametrize("kind", ["gba", "topk"])
def test_large_gradients_take_the_memory_of_the_last_ones(kind, monkeypatch, everywhere):
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    u = torch.nn.functional.normalize(x, dim=1)

    def steps(kept_above: int) -> tuple[SAE, list[list[int]]]:
        monkeypatch.setattr(adam, "KEPT_ABOVE", kept_above)
        sae = SAE(SAEConfig(24, 96, kind=kind, k=4), generator=torch.Generator().manual_seed(1))
        config = TrainConfig(steps=10, batch_size=64)
        state, places = start(sae, x, config), []
        assert state.optimizer is not None
        for _ in range(4):
            gradient_step(sae, u, state, config, 1e-3)
            state.optimizer.zero_grad()
            kept = (state.optimizer.used_up.get(p) for p in (sae.encoder, sae.W_dec))
            places.append([t.data_ptr() for t in kept if t is not None])
        return sae, places

    kept, places = steps(0)
    assert len(places[0]) == 2 and places == [places[0]] * 4
    plain, nothing = steps(1 << 60)
    assert nothing == [[]] * 4
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, kept.tensors()[name]), name


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_reconstruction_equals_its_reference_and_gradcheck(weighted):
    codes, w, x, bias = problem(6, 13, 5, 0.3)
    squared = torch.linspace(0.5, 2, 5, dtype=torch.float64) if weighted else None
    loss, x_hat = cpu.reconstruction(codes, w, bias, x, 0.25, squared)
    expected = codes.to_dense() @ w + bias
    error = (expected - x).square() * (1 if squared is None else squared)
    torch.testing.assert_close(x_hat, expected)
    torch.testing.assert_close(loss, 0.25 * error.sum())
    assert not x_hat.requires_grad

    def run(values, w, bias, x):
        return 3 * cpu.reconstruction(codes.with_values(values), w, bias, x, 0.25, squared)[0]

    leaves = [t.clone().requires_grad_() for t in (codes.values, w, bias, x)]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("output", ["values", "x_hat"])
def test_gradcheck_of_every_output_and_input(output, everywhere):
    codes, w, x, bias = problem(6, 13, 4, 0.1)
    assert sparse.products(w, 13) is cpu and 0 < codes.density < sparse.DENSE_ABOVE

    def run(x, w_enc, b_enc, b_dec, w_dec):
        pre = ((x - b_dec) @ w_enc + b_enc).detach()
        made = autograd.encode(x, w_enc, b_enc, b_dec, codes.with_values(pre[codes.row, codes.col]))
        return made.values if output == "values" else autograd.decode(made, w_dec)

    inputs = (x, w.T.clone(), w[:, 0].clone(), bias, w.clone())
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("m", [1, 63, 64, 65, 200])
def test_above_finds_what_nonzero_finds(dtype, m):
    matrix = torch.randn(37, m, generator=torch.Generator().manual_seed(m))
    matrix = (matrix * 3).round().clamp_min(0).byte() if dtype == torch.uint8 else matrix.to(dtype)
    matrix[0, 0] = -0.0
    for floor in (None, torch.tensor(0.0), torch.tensor(1.0)):
        expected = (matrix > (0 if floor is None else floor)).nonzero(as_tuple=True)
        found = cpu.above(matrix, floor)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@given(
    st.integers(1, 6), st.integers(1, 400), st.floats(0, 1), st.integers(0, 99),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from(["any", "ties", "rising", "falling", "negative"]),
)  # fmt: skip
def test_top_is_that_of_a_sort(n, m, share, seed, dtype, shape):
    k = max(1, round(share * m))
    matrix = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    if shape == "ties":
        matrix = matrix.round()
    elif shape == "negative":
        matrix = -matrix.abs()
    elif shape != "any":  # every entry, or none after the first k, is above the floor
        matrix = matrix.sort(descending=shape == "falling").values
    matrix = matrix.to(dtype)
    row, col = cpu.top(matrix, k)
    place = row * m + col
    assert (place.diff() > 0).all()  # rows, and columns within them, ascend; none twice
    found = torch.zeros(n, m, dtype=dtype).index_put((row, col), matrix[row, col])
    expected = matrix.clamp_min(0).sort(descending=True).values[:, :k]
    assert torch.equal(found.sort(descending=True).values[:, :k], expected)
    assert torch.equal(row.bincount(minlength=n), (expected > 0).sum(1))


@pytest.mark.parametrize("select", [topk, batch_topk])
@pytest.mark.parametrize("shift", [0.0, -2.5], ids=["enough", "too few above 0"])
def test_ranked_codes_are_those_of_torch(select, shift, monkeypatch):
    pre = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)) + shift
    slow = select(pre, 12)
    monkeypatch.setattr(choice, "LARGE", 0)
    fast = select(pre, 12)
    assert all(torch.equal(*pair) for pair in zip(fast[:4], slow[:4], strict=True))


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_updated_rows_are_those_of_adam_and_a_projection(dtype):
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(9, 70, generator=generator, dtype=dtype)
    mine, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    adams = [Adam([{"params": [p]}], lr=0.01) for p in (mine, plain)]
    for _ in range(4):
        mine.grad = torch.randn(9, 70, generator=generator, dtype=dtype)
        plain.grad = mine.grad.clone()
        cpu.adam_unit_rows(adams[0], mine)
        adams[1].unit_rows(plain)
        assert mine.grad is None
        torch.testing.assert_close(mine, plain, rtol=0, atol=CLOSE[dtype] / 10)
    for name, value in adams[1].state[plain].items():
        close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype] * float(value.abs().max())}
        torch.testing.assert_close(adams[0].state[mine][name], value, **close)
    torch.testing.assert_close(mine.norm(dim=1), torch.ones(9, dtype=dtype))


@pytest.mark.parametrize("unit", [40.0, 2000.0])
def test_rounded_latents_follow_their_definition(unit):
    generator = torch.Generator().manual_seed(3)
    w = torch.nn.functional.normalize(torch.randn(300, 70, generator=generator), dim=1)
    b = torch.randn(300, generator=generator)
    w[0], b[1] = 0, 0
    most, columns = screen.MOST, screen.BIAS_COLUMNS
    made = screen._latents(w, b, unit).long() - 128
    step = torch.maximum(w.abs().amax(1).clamp_min(1e-30) / most, b.abs() * unit / most / columns)
    p, spread = made[:, :70], made[:, 70 : 70 + columns]
    assert ((p - w / step[:, None]).abs() <= 0.5 + 1e-4).all()
    over = spread.sum(1) - b * unit / step
    assert ((over > -1e-3) & (over < 1 + 1e-3)).all()
    assert (spread.abs() <= most).all() and (spread.sign() * b.sign()[:, None] >= 0).all()
    margin = p.double().norm(dim=1) * screen.UNIT_MARGIN
    assert ((made[:, -2] >= margin - 1e-4) & (made[:, -2] < margin + 1)).all()
    assert (made[:, -1] == most).all()


def test_the_number_of_threads_changes_nothing():
    codes, w, x, bias = problem(61, 90, 33, 0.2, torch.float32)
    codes, before = codes.grouped(), torch.get_num_threads()

    def everything() -> list[torch.Tensor]:
        leaf = w.clone().requires_grad_()
        loss, x_hat = cpu.reconstruction(codes, leaf, bias, x, 0.1)
        loss.backward()
        assert leaf.grad is not None
        parts = [*cpu.above(x), *cpu.top(x, 5), cpu.matmul(codes, w), cpu.sampled(codes, x, w)]
        return [*parts, x_hat, leaf.grad, screen._latents(w, w[:, 0], 50.0)]

    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(everything())
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_loading_leaves_the_number_of_threads_of_torch():
    code = (
        "import torch\ntorch.set_num_threads(1)\nfrom sae_core.kernels import cpu\n"
        "cpu.above(torch.ones(4, 4))\nprint(torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.stdout == "1\n", run.stderr


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("gba", "float32"),
        ("gba", "bfloat16"),
        ("topk", "float32"),  # in bfloat16 numbers tie, and either may be kept
        ("batch_topk", "bfloat16"),
        ("jumprelu", "bfloat16"),
    ],
)
def test_gradients_of_a_step_are_those_of_torchs_kernels(kind, precision, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    # biases start where tokens of the sample lie, which rounding then puts on either side
    sample, x = torch.randn(2, 128, 24, generator=generator)
    config = TrainConfig(steps=1, batch_size=128, precision=precision)

    def moments() -> list[torch.Tensor]:
        """A tenth of the gradients: Adam's means after one step."""
        sae = SAE(SAEConfig(24, 96, kind, k=6), generator=torch.Generator().manual_seed(0))
        state = start(sae, sample, config)
        gradient_step(sae.train(), sae.normalise(x)[0], state, config, 1e-3)
        assert state.optimizer is not None
        return [one["exp_avg"] for one in state.optimizer.state.values()]

    plain, called = moments(), []

    def recorded(loop, *rest, run=cpu._run):
        called.append(loop.__name__)
        return run(loop, *rest)

    monkeypatch.setattr(choice, "LARGE", 0)
    monkeypatch.setattr(cpu, "_run", recorded)
    fast = moments()
    assert {"sums", "reconstruct", "adam_unit_rows"} <= set(called)
    assert ("dots" in called) == (precision == "bfloat16")  # active entries computed anew
    assert ("top" in called) == (kind == "topk")
    assert len(plain) == len(fast) and any(one.ndim == 2 and one.any() for one in fast)
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def test_who_is_served(monkeypatch):
    large, small = torch.zeros(1 << 10, 1 << 10), torch.zeros(1 << 9, 1 << 10)
    assert choice.products(large, 1 << 10) is cpu and choice.products(large, 1 << 9) is None
    assert choice.products(large.bfloat16(), 1 << 10) is None
    assert choice.cpu_kernels(large.bfloat16(), large.numel()) is cpu
    assert choice.cpu_kernels(small, small.numel()) is None
    monkeypatch.setattr(choice, "has_threads", lambda: False)
    assert choice.products(large, 1 << 10) is None
    assert isinstance(active.above(large)[0], torch.Tensor)


def test_threads_are_those_of_openmp_or_tbb(monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    compiled._has_layer.cache_clear()
    try:
        monkeypatch.setattr(compiled, "import_module", absent)
        assert not compiled.has_threads()
    finally:
        compiled._has_layer.cache_clear()


OTHER_LOOP = """
from numba import njit, prange
@njit(parallel=True)
def total(x):
    found = 0.0
    for i in prange(len(x)):
        found += x[i]
    return found
total(matrix[0].numpy())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("start", ["active.above(matrix)", OTHER_LOOP], ids=["ours", "another's"])
def test_a_fork_leaves_the_loops_alone(start):
    code = """
import os, torch
torch.set_num_threads(1)
from sae_core.kernels import active, compiled, screen
matrix = torch.ones(1 << 10, 1 << 10)
n = matrix.numel()
{start}
torch.set_num_threads(1)  # others' loops set it to all there are; torch's own would hang in a fork
assert compiled.has_threads()
if os.fork() == 0:
    assert not compiled.has_threads() and not screen.serves(matrix)
    os._exit(0 if len(active.above(matrix)[0]) == n else 1)
print(os.wait()[1])
""".replace("{start}", start)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.stdout == "0\n", run.stderr
