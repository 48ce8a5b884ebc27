"""Several processes share a training: tokens, latents or both split, one result.

Real processes over gloo on loopback, all scenarios in one start each of two and of four.
"""

import dataclasses
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

from sae_core import demand
from sae_core.buffer import batches
from sae_core.checkpoint import load_checkpoint, save_checkpoint
from sae_core.errors import UserError
from sae_core.gba import GBAConfig
from sae_core.loss import SparsityConfig
from sae_core.nonlinearity import kth_largest
from sae_core.parallel import ALONE, AXES, Layout, world_layout
from sae_core.reweighting import WeightConfig
from sae_core.sae import SAE, SAEConfig
from sae_core.sharded import shard_of, whole_of
from sae_core.train import TrainConfig, TrainState, train
from tests.test_train import planted

KINDS = ("gba", "topk", "batch_topk", "jumprelu", "relu")
CONFIG = TrainConfig(
    steps=24, batch_size=128, lr=5e-3, init_tokens=500, log_every=8,
    gba=GBAConfig(4, calibrate_tokens=1000),
    sparsity=SparsityConfig(dead_after_tokens=256),
)  # fmt: skip
CONFIGS = {kind: CONFIG for kind in KINDS} | {
    "variance": dataclasses.replace(CONFIG, weights=WeightConfig("variance")),
    "frobenius": dataclasses.replace(CONFIG, weights=WeightConfig("frobenius", refresh=5)),
    "bfloat16": dataclasses.replace(CONFIG, precision="bfloat16"),
}
SCENARIOS = {  # processes, latent parts: what is trained
    (2, 1): tuple(CONFIGS),
    # not bfloat16: its product of fewer latents rounds otherwise, which decides entries near 0
    (2, 2): (*KINDS, "variance"),
    (4, 2): ("gba", "topk", "batch_topk"),
}
PATIENCE = timedelta(hours=7)
# float32 sums in another order, over 24 steps of Adam
RTOL, ATOL = 2e-3, 3e-4


def new(name: str) -> SAE:
    config = SAEConfig(16, 192, kind=name if name in KINDS else "gba", k=6)  # type: ignore[arg-type]
    return SAE(config, generator=torch.Generator().manual_seed(0))


def trained(name: str, layout: Layout) -> dict[str, Any]:
    """What a training gives on one layout: the process's own tensors, and (on the first) all."""
    config, x = CONFIGS[name], planted()
    sae, state = shard_of(new(name), TrainState(), config, layout)
    part = (layout.part("tokens"), layout.parts("tokens"))
    stream = batches(x, config.batch_size, seed=0, part=part)
    records = [dataclasses.asdict(r) for r in train(sae, stream, config, state)]
    found: dict[str, Any] = {"own": sae.tensors(), "part": layout.part("latents")}
    found["records"] = records
    if (whole := whole_of(sae, state, config)) is not None:
        joined, of = whole
        assert of.optimizer is not None
        found["tensors"] = joined.tensors()
        moments = of.optimizer.state[joined._encoder]["exp_avg_sq"]
        found["counters"] = {"since": of.tokens_since, "group": of.group, "moments": moments}
    return found


def _process(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
        timeout=PATIENCE,
    )  # fmt: skip
    found: dict[Any, Any] = {}
    for (processes, latent_parts), names in SCENARIOS.items():
        if processes == world:
            layout = world_layout(latent_parts, timeout=PATIENCE)
            for name in names:
                found[latent_parts, name] = trained(name, layout)
            found[latent_parts, "kth"] = _kth(layout, rank)
            found[latent_parts, "patience"] = _patience(layout)
    if world == 2:
        _stop(world_layout(2), Path(folder))
        for parts in (1, 2):
            found[parts, "resumed"] = _resumed(world_layout(parts), Path(folder))
        found["refused"] = _refused(rank)
        found["own seeds"] = _own_seeds(rank)
        found["meshes"] = [_meshes_made(world_layout(parts)) for parts in (1, 2)]
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    # A process that leaves early aborts the other, and gloo's threads may abort their own process
    # when they are torn down ("terminate called without an active exception").
    time.sleep(0.5)
    os._exit(0)


def _values(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(5000 + 300 * rank, generator=generator) * 10.0 ** (rank % 3 - 1)
    values[:50] = 0.25  # equal on all
    values[50:90] = -0.0
    return values


def _patience(layout: Layout) -> list[float]:
    """Seconds that this process waits for the others along each axis that is split."""
    backends = [group._get_backend(torch.device("cpu")) for group in layout._groups(AXES)]
    return [backend.options._timeout.total_seconds() for backend in backends]


def _kth(layout: Layout, rank: int) -> list[float]:
    return [float(layout.kth_largest(_values(rank), k)) for k in (1, 7, 400, 9000)]


def _stop(layout: Layout, folder: Path) -> None:
    """Half of a training, saved by the first process as one whole."""
    sae, state = shard_of(new("gba"), TrainState(), CONFIG, layout)
    for record in train(sae, batches(planted(), 128, seed=0), CONFIG, state):
        if record.step == 16:
            break
    if (whole := whole_of(sae, state, CONFIG)) is not None:
        save_checkpoint(folder / "checkpoints", *whole, CONFIG)
    layout.wait()


def _resumed(layout: Layout, folder: Path) -> dict[str, torch.Tensor] | None:
    """The other half, from the checkpoint; tensors of the whole on the first process."""
    loaded = load_checkpoint(folder / "checkpoints", CONFIG)
    assert loaded is not None
    sae, state = shard_of(*loaded, CONFIG, layout)
    part = (layout.part("tokens"), layout.parts("tokens"))
    list(train(sae, batches(planted(), 128, seed=0, start_step=16, part=part), CONFIG, state))
    whole = whole_of(sae, state, CONFIG)
    return None if whole is None else whole[0].tensors()


def _own_seeds(rank: int) -> dict[str, torch.Tensor]:
    """`train` itself, on an SAE that each process has made with a seed of its own."""
    sae = SAE(new("topk").config, generator=torch.Generator().manual_seed(rank))
    stream = batches(planted(), CONFIG.batch_size, seed=0, part=(rank, 2))
    list(train(sae, stream, CONFIGS["topk"]))
    return sae.tensors()


def _meshes_made(layout: Layout) -> int:
    """How often a training makes a mesh out of another, which takes as long as a small step."""
    sae, state = shard_of(new("gba"), TrainState(), CONFIG, layout)
    part = (layout.part("tokens"), layout.parts("tokens"))
    stream = batches(planted(), CONFIG.batch_size, seed=0, part=part)
    made, get = [], DeviceMesh.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceMesh, "__getitem__", lambda *a: made.append(a) or get(*a))
        list(train(sae, stream, CONFIG, state))
    return len(made)


def _refused(rank: int) -> list[str]:
    def told(call: Any) -> str:
        with pytest.raises(UserError) as error:
            call()
        return str(error.value)

    split, wide = world_layout(2), SAEConfig(16, 49, k=6)
    ranked = SAE(SAEConfig(16, 8, kind="topk", k=6))
    unequal = [planted(64 + rank)] * 30  # the processes disagree on the size of a batch
    return [
        told(lambda: world_layout(3)),
        told(lambda: shard_of(SAE(wide), TrainState(), CONFIG, split)),
        told(lambda: shard_of(ranked, TrainState(), CONFIG, split)),
        told(lambda: shard_of(new("gba"), TrainState(), CONFIGS["frobenius"], split)),
        told(lambda: list(train(new("gba"), unequal, dataclasses.replace(CONFIG, init_tokens=64)))),
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Results by (processes, latent parts, name) of every rank, and the folder."""
    folder = tmp_path_factory.mktemp("parallel")
    results: dict[Any, Any] = {"folder": folder}
    for world in (2, 4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.start_processes(_process, args=(world, port, str(folder)), nprocs=world)
        for rank in range(world):
            results[world, rank] = torch.load(folder / f"{world}-{rank}.pt", weights_only=True)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same trainings in this process."""
    return {name: trained(name, ALONE) for name in CONFIGS}


CASES = [(*key, name) for key, names in SCENARIOS.items() for name in names]


@pytest.mark.parametrize(("world", "latent_parts", "name"), CASES)
def test_processes_give_the_result_of_one(found, alone, world, latent_parts, name) -> None:
    ranks = [found[world, rank][latent_parts, name] for rank in range(world)]
    for key, tensor in alone[name]["tensors"].items():
        torch.testing.assert_close(ranks[0]["tensors"][key], tensor, rtol=RTOL, atol=ATOL)
    for one in ranks:
        assert one["records"] == ranks[0]["records"]
        twin = next(other for other in ranks if other["part"] == one["part"])
        for key, tensor in one["own"].items():  # to the bit, or they would drift apart
            assert torch.equal(tensor, twin["own"][key]), key
    for ours, theirs in zip(ranks[0]["records"], alone[name]["records"], strict=True):
        assert ours == pytest.approx(theirs, rel=RTOL)
    mine, theirs = ranks[0]["counters"], alone[name]["counters"]
    torch.testing.assert_close(mine["moments"], theirs["moments"], rtol=1e-2, atol=1e-6)
    # a latent near a threshold may fire on one of two sums
    assert (mine["since"] != theirs["since"]).float().mean() < 0.05
    if len(theirs["group"]):
        assert (mine["group"] != theirs["group"]).float().mean() < 0.05


def test_something_is_at_stake(alone) -> None:
    """Controls: the trainings differ from each other and have learned, and latents died."""
    for name in CONFIGS:
        assert alone[name]["records"][-1]["fvu"] < 0.6 * alone[name]["records"][0]["fvu"] or name
        start = new(name).tensors()["W_dec"]
        assert (alone[name]["tensors"]["W_dec"] - start).abs().max() > 100 * ATOL
    assert any(alone[name]["records"][-1]["dead_fraction"] > 0 for name in ("topk", "batch_topk"))


@pytest.mark.parametrize(("world", "latent_parts"), SCENARIOS)
def test_the_kth_largest_of_all_is_exact(found, world, latent_parts) -> None:
    everything = torch.cat([_values(rank) for rank in range(world)])
    expected = [float(kth_largest(everything, k)) for k in (1, 7, 400, 9000)]
    for rank in range(world):
        assert found[world, rank][latent_parts, "kth"] == expected


@pytest.mark.parametrize(("world", "latent_parts"), SCENARIOS)
def test_all_wait_as_long_as_they_were_told_to(found, world, latent_parts) -> None:
    for rank in range(world):
        assert set(found[world, rank][latent_parts, "patience"]) == {PATIENCE.total_seconds()}


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_go_on_where_two_stopped(found, alone, parts) -> None:
    for key, tensor in alone["gba"]["tensors"].items():
        resumed = found[2, 0][parts, "resumed"][key]
        torch.testing.assert_close(resumed, tensor, rtol=RTOL, atol=ATOL)


def test_one_process_goes_on_where_two_stopped(found, alone) -> None:
    loaded = load_checkpoint(found["folder"] / "checkpoints", CONFIG)
    assert loaded is not None
    sae, state = loaded
    assert state.step == 16 and sae.d_sae == 192
    stream = batches(planted(), 128, seed=0, start_step=16)
    list(train(sae, stream, CONFIG, state))
    for key, tensor in alone["gba"]["tensors"].items():
        torch.testing.assert_close(sae.tensors()[key], tensor, rtol=RTOL, atol=ATOL)


def test_what_cannot_be_split_is_refused(found) -> None:
    for rank in range(2):
        told = found[2, rank]["refused"]
        assert "divides the 2 processes, got 3" in told[0]
        assert "multiple of 2 parts, got 49" in told[1]
        assert "k=6 latents in each of 2 parts, got 4" in told[2]
        assert "frobenius" in told[3] and "got 2" in told[3]
        assert "batches of one size" in told[4] and "1032 on 2 processes" in told[4]


def test_train_begins_with_the_weights_of_the_first_process(found, alone) -> None:
    ours, theirs = (found[2, rank]["own seeds"] for rank in range(2))
    for key, tensor in alone["topk"]["tensors"].items():
        assert torch.equal(ours[key], theirs[key]), key
        torch.testing.assert_close(ours[key], tensor, rtol=RTOL, atol=ATOL)


def test_a_step_makes_no_mesh(found) -> None:
    assert [found[2, rank]["meshes"] for rank in range(2)] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 600])
@pytest.mark.parametrize("own", [1, 30, 600])
def test_the_demand_is_that_of_the_same_tokens_in_any_number_of_processes(parts, own) -> None:
    dealt = torch.arange(own * parts).reshape(own, parts).T  # token by token, a process a row
    looked_at = [row[:n] for row, n in zip(dealt, demand._shares(own, parts), strict=True)]
    assert torch.cat(looked_at).sort().values.tolist() == list(range(
        min(own * parts, max(parts, demand.TOKENS))
    ))  # fmt: skip


def test_parts_of_a_batch_are_the_batch() -> None:
    x = planted(1000)
    whole = batches(x, 30, seed=3, epochs=2)
    parts = [batches(x, 30, seed=3, epochs=2, part=(i, 3)) for i in range(3)]
    for batch, *split in zip(whole, *parts, strict=True):
        joined = torch.stack([p.row_id for p in split], dim=1).flatten()
        assert torch.equal(joined, batch.row_id)
    with pytest.raises(UserError, match="multiple of the 4 processes"):
        batches(x, 30, seed=3, part=(0, 4))
