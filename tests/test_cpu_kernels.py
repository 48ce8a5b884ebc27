"""The suite of the processor's kernels: both sides of each comparison give the same."""

import torch

from benchmarks import cpu_kernels
from sae_core.kernels import active, choice, compiled, eager, sparse


def test_both_sides_of_each_comparison_agree(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "N", 300)
    u, rows, bias, codes = cpu_kernels.batch(128)
    assert codes.n == 300 and 10 < len(codes.col) / 300 < 30
    ours = active.active_codes(u, rows.T, bias, dtype=torch.bfloat16)
    theirs = cpu_kernels.dense_search(u, rows, bias)
    assert 10 < len(theirs.col) / 300 < 40
    torch.testing.assert_close(ours.keep(ours.values > 0).to_dense(), theirs.to_dense())
    found = cpu_kernels.mkl(codes.crow, codes.col, codes.values, 128, rows)
    torch.testing.assert_close(found, sparse.matmul(codes, rows))
    torch.testing.assert_close(found, eager.matmul(codes, rows))
    torch.testing.assert_close(cpu_kernels.mkl_transposed(codes, u), sparse.matmul_t(codes, u))


def test_the_loops_are_left_out_on_request_and_come_back(monkeypatch) -> None:
    rows = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    monkeypatch.setattr(choice, "LARGE", 0)
    with_loops = choice.products(rows, 64)
    assert cpu_kernels.by_torch(lambda: choice.products(rows, 64))() is None
    assert choice.products(rows, 64) is with_loops
    for update in cpu_kernels.updates(rows).values():
        update()
    assert len(cpu_kernels.updates(rows)) == 1 + compiled.has_threads()


def test_rows_and_goals_of_a_small_run(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "N", 256)
    rows = cpu_kernels.kernel_rows(128, 1)
    assert rows[0]["what"] == "product bfloat16" and rows[0]["times"] == 1
    assert {"active set", "active set, dense", "A W", "A' G", "step of TopK, torch"} <= {
        row["what"] for row in rows
    }
    slow = [row | {"ms": 5.0} for row in rows]
    missed = {row["what"]: row["passed over"] for row in rows}
    assert 0 < missed["active set"] < 0.2
    if "active set, int8" in missed:
        assert missed["active set, int8"] < missed["active set"]
    met = {goal.name: goal.met for goal in cpu_kernels.goals(slow)}
    assert met["A W over MKL, 128"] and not met["step over the product, 128"]
    slower = [row | {"ms": 9.0 if row["what"] == "A W" else 5.0} for row in rows]
    assert not {goal.name: goal.met for goal in cpu_kernels.goals(slower)}["A W over MKL, 128"]


def test_ours_adds_no_compiler_to_a_process() -> None:
    theirs, ours = (row["MiB"] for row in cpu_kernels.memory_rows())
    assert ours < 5 < theirs
