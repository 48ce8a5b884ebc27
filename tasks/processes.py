"""Several processes that share one command, as torchrun starts them.

    torchrun --nproc-per-node 2 -m sae_apps.tasks.main train ... --out runs/x

The first process reads, writes and prints; the others wait for what it has to say, and train with
it. When it fails before that, they end with its exit code and leave the message to it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sae_core.errors import UserError

from .common import EXIT_BAD_INPUT, Interrupted

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from .settings import TrainSettings

PATIENCE = timedelta(days=30)  # of processes that wait for the first one, which harvests and saves
GONE = ("Connection closed by peer", "Connection reset by peer")


def n_processes() -> int:
    """Processes that share this command; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Is this the process that reads, writes and prints?"""
    return n_processes() == 1 or os.environ.get("RANK", "0") == "0"


def leave(code: int) -> int:
    """End this process if it is one of several; else only the code comes back.

    At once, because gloo's threads abort a process that takes its groups down while it ends (torch
    2.13: every third time, "terminate called without an active exception").
    """
    if n_processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def own_device(device: str) -> str:
    """The device of this process: where all were given cuda, each has a card of its own."""
    local = os.environ.get("LOCAL_RANK", "0")
    return f"cuda:{local}" if device == "cuda" and n_processes() > 1 else device


def shares(settings: "TrainSettings", d_in: int | None = None) -> tuple[int, int]:
    """Parts of the tokens and of the latents; each process has one of each.

    Raises:
        UserError: the processes, a batch or (where d_in is given) the latents cannot be split so.
    """
    from sae_core.parallel import split

    token_parts, latent_parts = split(n_processes(), settings.run.latent_parts)
    if settings.train.batch_size % token_parts:
        raise UserError(
            f"Expected a batch size that {token_parts} processes can share equally, "
            f"got {settings.train.batch_size}."
        )
    if d_in is not None:
        from sae_core.sharded import check_split

        check_split(settings.sae_config(d_in), settings.train, latent_parts)
    return token_parts, latent_parts


@dataclass(frozen=True)
class _Failed:
    """The first process ended before there was anything to share."""

    code: int


@dataclass
class Team:
    """The processes of one command."""

    is_awaited: bool = True
    """Are the others waiting for what the first one tells? Then they hear of its failure."""

    def tell(self, value: Any, *, more: bool = False) -> None:
        """Let the others know; only the first process calls it.

        Args:
            more: they wait for the next word at once.
        """
        _broadcast(value)
        self.is_awaited = more

    def hear(self) -> Any:
        """What the first process tells.

        Raises:
            SystemExit: it failed.
        """
        value = _broadcast(None)
        if isinstance(value, _Failed):
            raise SystemExit(value.code)
        return value


def _broadcast(value: Any) -> Any:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """Be one of the processes while the block runs; nothing happens where there is only one.

    Raises:
        UserError: the device is no card that this process can have.
        SystemExit: another process has gone.
    """
    team = Team()
    if n_processes() == 1:
        yield team
        return

    store = _store()
    if device.startswith("cuda"):
        _take_cards(own_device(device), store)
    _meet(store, "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield team
        _broadcast(None)  # nobody leaves while another is still at work
    except BaseException as error:
        if isinstance(error, RuntimeError) and any(text in str(error) for text in GONE):
            raise SystemExit(1) from error
        if is_first() and team.is_awaited:
            with suppress(RuntimeError):  # of one that has gone: this error is what there is to say
                _broadcast(_Failed(_exit_code(error)))
        raise


def _store() -> "Store":
    """Where the processes leave words for each other before they meet.

    On one machine torchrun keeps its store over a restart, with the addresses of the processes that
    are gone (torch 2.13); names of their own for each attempt keep the new ones from these. On
    several machines the attempts are not counted alike: there it must make a new store each time
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).

    Raises:
        UserError: nothing says where the other processes are.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise UserError(
            f"Expected {', '.join(needed)} beside WORLD_SIZE={n_processes()}, as torchrun sets "
            f"them, got none of {', '.join(missing)}."
        )
    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"attempt {attempt}", store)
    return store


def _meet(store: "Store", backend: str) -> None:
    """Find the other processes."""
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), n_processes()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def _take_cards(device: str, store: "Store") -> None:
    """Take this process's card. Where one has none all end, and the first one says so."""
    import torch

    store.set(f"card {os.environ['RANK']}", _refused(device))
    told = [store.get(f"card {rank}").decode() for rank in range(n_processes())]
    if refused := next(filter(None, told), None):
        if is_first():
            raise UserError(refused)
        raise SystemExit(EXIT_BAD_INPUT)
    torch.cuda.set_device(device)


def _refused(device: str) -> str:
    """Why this process cannot have the card; nothing where it can."""
    import torch

    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if n_local > 1 and device != own_device("cuda"):
        return (
            f"Expected the device cuda, which gives each of {n_local} processes a card of its own, "
            f"got {device}."
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(device).index or 0) >= found:
        return f"Expected a CUDA card for each process, got {found} and asked {device}."
    return ""


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return EXIT_BAD_INPUT
    return 128 + error.signum if isinstance(error, Interrupted) else 1
