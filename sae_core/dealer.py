"""Forward passes of a harvest, dealt out in turns among the processes of torch.distributed.

All processes cut the same text into the same batches; process r runs the model on the batches r,
r + P, ... and hands the kept activations to the first one, which goes through all of them in order,
as if it had run them itself. Nothing else of a harvest changes: same shards, same journal, and the
same place to start again from.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from sae_core.tokens import TokenBatch

Values = dict[str, Tensor]
AHEAD = 2  # batches that a process may be ahead of the first one


@dataclass
class Dealer:
    """Who runs which batch; alone, this process runs all of them."""

    count: int = 0
    """Batches dealt out so far."""
    widths: dict[str, tuple[int, torch.dtype]] = field(default_factory=dict)
    """Width and type at each hook point, as the first process found them in its first batch."""
    under_way: deque[list[dist.Work]] = field(default_factory=deque)
    sent: deque[list[Tensor]] = field(default_factory=deque)

    def values(self, batch: TokenBatch, run: Callable[[TokenBatch], Values]) -> Values | None:
        """Kept activations of the next batch at each hook point; None where another has them."""
        n_processes = dist.get_world_size() if dist.is_initialized() else 1
        owner, self.count = self.count % n_processes, self.count + 1
        if n_processes == 1:
            return run(batch)
        if dist.get_rank() == 0:
            found = run(batch) if owner == 0 else self._receive(owner, len(batch.keep))
            self.widths = {name: (x.shape[1], x.dtype) for name, x in found.items()}
            return found
        if owner == dist.get_rank():
            self._send(run(batch))
        return None

    def _receive(self, owner: int, n: int) -> Values:
        found = {}
        for name, (width, dtype) in self.widths.items():
            found[name] = torch.empty(n, width, dtype=dtype)
            if n:
                dist.recv(found[name].view(torch.uint8), owner)
        return found

    def _send(self, values: Values) -> None:
        while len(self.under_way) >= AHEAD:
            self._wait()
        bytes_of = [x.cpu().contiguous().view(torch.uint8) for x in values.values() if len(x)]
        self.under_way.append([dist.isend(x, 0) for x in bytes_of])  # type: ignore[misc]
        self.sent.append(bytes_of)  # alive until they have arrived

    def _wait(self) -> None:
        for work in self.under_way.popleft():
            work.wait()
        self.sent.popleft()

    def finish(self) -> None:
        """Wait until everything has arrived."""
        while self.under_way:
            self._wait()
