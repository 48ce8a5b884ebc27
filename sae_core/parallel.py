"""Which processes share a training: the tokens are split among them, the latents, or both.

    processes = a mesh [token parts, latent parts]

tokens    every process has its own part of each batch and the same latents: sums over tokens are
          added up (data parallel)
latents   every process has its own latents, with Adam's moments of them, and the same tokens:
          reconstructions are added up (tensor parallel; for SAEs that one card cannot hold)

What a step needs from the other processes is a sum, a maximum, a ranking or all latents' numbers;
each is a method here, and does nothing where its axis is not split. So the result is that of one
process with the joined batch and all latents, to rounding. A forward sum over latents has the
identity as its gradient, and a parameter that all of them read has the sum (Shoeybi and others,
arXiv 1909.08053, section 3: its g and f).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.nonlinearity import exceeded, kth_largest

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Axis = Literal["tokens", "latents"]
AXES: tuple[Axis, ...] = ("tokens", "latents")
BYTES = (24, 16, 8, 0)  # of a float32, from the highest


@dataclass(frozen=True)
class Layout:
    """The place of this process among those that share a training."""

    mesh: "DeviceMesh | None" = None
    """Of the axes tokens and latents; None: this process is alone."""

    def parts(self, axis: Axis) -> int:
        """Into how many parts an axis is split."""
        # self.mesh[axis] would make a mesh: a quarter of a millisecond, and dozens in a step
        return 1 if self.mesh is None else self.mesh.get_group(axis).size()

    def part(self, axis: Axis) -> int:
        """Which of them this process has, from 0."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def device(self) -> str:
        """Type of device that the processes exchange tensors on."""
        return "cpu" if self.mesh is None else self.mesh.device_type

    @property
    def is_first(self) -> bool:
        """Does this process write what all of them know?"""
        return all(self.part(axis) == 0 for axis in AXES)

    def _groups(self, axes: tuple[Axis, ...]) -> list[dist.ProcessGroup]:
        """Groups of this process along the axes that are split."""
        if self.mesh is None:
            return []
        return [self.mesh.get_group(axis) for axis in axes if self.parts(axis) > 1]

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.mesh is not None:
            dist.barrier()

    # ---- sums and maxima, in place ----

    @torch.no_grad()
    def add(self, x: Tensor, *axes: Axis) -> Tensor:
        """x, summed over the processes along the axes."""
        for group in self._groups(axes):
            dist.all_reduce(x, group=group)
        return x

    @torch.no_grad()
    def average(self, x: Tensor, axis: Axis) -> Tensor:
        """x, averaged over the processes along the axis."""
        return self.add(x, axis).div_(self.parts(axis)) if self.parts(axis) > 1 else x

    @torch.no_grad()
    def largest(self, x: Tensor, *axes: Axis) -> Tensor:
        """The elementwise maximum of x over the processes along the axes."""
        for group in self._groups(axes):
            dist.all_reduce(x, dist.ReduceOp.MAX, group)
        return x

    @torch.no_grad()
    def smallest(self, x: Tensor, *axes: Axis) -> Tensor:
        """The elementwise minimum of x over the processes along the axes."""
        for group in self._groups(axes):
            dist.all_reduce(x, dist.ReduceOp.MIN, group)
        return x

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor], axis: Axis) -> None:
        """Give the tensors the values of the first process along the axis, in place."""
        for group in self._groups((axis,)):
            for tensor in tensors:
                dist.broadcast(tensor, group=group, group_src=0)

    # ---- what the others have ----

    @torch.no_grad()
    def gathered(self, x: Tensor, axis: Axis) -> Tensor:
        """[parts, ...]: the x of every process along the axis, in their order."""
        parts = [torch.empty_like(x) for _ in range(self.parts(axis))]
        for group in self._groups((axis,)):
            dist.all_gather(parts, x.contiguous(), group=group)
            return torch.stack(parts)
        return x[None]

    def all_tokens(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n_all d"]:
        """The tokens of all parts, in the order of the batches that were dealt out one by one."""
        return self.gathered(x, "tokens").transpose(0, 1).flatten(0, 1)

    def all_latents(self, x: Tensor) -> Tensor:
        """[d_sae]: the numbers of all latents."""
        return self.gathered(x, "latents").flatten()

    def own_latents(self, x: Tensor) -> Tensor:
        """The part of [d_sae] numbers that belongs to this process's latents."""
        return x.chunk(self.parts("latents"))[self.part("latents")]

    def kth_largest(self, values: Float[Tensor, "n"], k: int) -> Float[Tensor, ""]:
        """The k-th largest of the values of all processes; exact (in float32).

        Only values above a common guess take part, and they are counted byte by byte from the
        highest: four sums of 256 counts, whatever the number of values (radix selection).
        """
        if not self._groups(AXES):
            return kth_largest(values, k)
        n_processes = self.parts("tokens") * self.parts("latents")
        share = min(values.shape[0], -(-k // n_processes))
        floor = self.smallest(exceeded(values, share).float(), *AXES)
        kept = values[values > floor]
        total = self.add(torch.tensor(kept.shape[0], device=values.device), *AXES)
        return self._radix((kept if total >= k else values).float(), k)

    def _radix(self, values: Float[Tensor, "n"], k: int) -> Float[Tensor, ""]:
        bits = values.view(torch.int32)
        key = _ordered(bits).long() + 2**31
        prefix = 0
        for shift in BYTES:
            byte = (key >> shift) & 255
            count = self.add(torch.bincount(byte, minlength=256), *AXES)
            reached = count.flip(0).cumsum(0).flip(0)  # values whose byte is at least this
            chosen = int((reached >= k).sum()) - 1
            k -= int(reached[chosen] - count[chosen])
            prefix, key = prefix << 8 | chosen, key[byte == chosen]
        found = torch.tensor(prefix - 2**31, dtype=torch.int32, device=values.device)
        return _ordered(found).view(torch.float32)

    # ---- differentiable ----

    def summed(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The sum over latent parts; its gradient is passed on as it is."""
        groups = self._groups(("latents",))
        return _Sum.apply(x, groups[0]) if groups else x

    def shared(self, x: Tensor) -> Tensor:
        """x, which every latent part reads; its gradient is the sum of theirs."""
        groups = self._groups(("latents",))
        return _Shared.apply(x, groups[0]) if groups else x


ALONE = Layout()


def _ordered(bits: Tensor) -> Tensor:
    """Bits of float32 as integers in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = d.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def split(n_processes: int, latent_parts: int) -> tuple[int, int]:
    """Parts of the tokens and of the latents among so many processes.

    Raises:
        UserError: the number of processes is no multiple of the parts.
    """
    if latent_parts < 1 or n_processes % latent_parts:
        raise UserError(
            f"Expected a number of latent parts that divides the {n_processes} processes, "
            f"got {latent_parts}."
        )
    return n_processes // latent_parts, latent_parts


def world_layout(
    latent_parts: int = 1, device: str = "cpu", timeout: timedelta | None = None
) -> Layout:
    """All processes of torch.distributed: the latents in so many parts, the tokens in the others.

    Neighbouring ranks share tokens, since a sum of reconstructions takes more than one of
    gradients and they are likeliest to sit in one machine.

    Args:
        device: cpu or cuda, where the SAE lies.
        timeout: how long a process waits for others, e.g. while the first one writes a checkpoint
            (None: torch's, 10 minutes on cards; without both splits that of the group of all).
    Raises:
        UserError: the number of processes is no multiple of the parts.
    """
    n_processes = dist.get_world_size() if dist.is_initialized() else 1
    shape = split(n_processes, latent_parts)
    return ALONE if n_processes == 1 else Layout(_mesh(shape, device, timeout))


def _mesh(shape: tuple[int, int], device: str, timeout: timedelta | None) -> "DeviceMesh":
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if timeout is None or 1 in shape:
        return init_device_mesh(device, shape, mesh_dim_names=AXES)
    ranks = torch.arange(shape[0] * shape[1]).reshape(shape)
    groups: list[dist.ProcessGroup] = []
    for lines in (ranks.T, ranks):
        own, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timeout)
        assert isinstance(own, dist.ProcessGroup)  # every process is in one
        groups.append(own)
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=AXES)
