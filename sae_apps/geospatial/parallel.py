"""Threads for compiled loops, which release the GIL; their number is torch's."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def threads() -> int:
    """Threads to use: those of torch, which follow ``OMP_NUM_THREADS``."""
    return torch.get_num_threads()


def in_threads(work: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
    """Results of the tasks in their order; with one thread or one task, in this thread."""
    tasks = list(tasks)
    n = min(threads(), len(tasks))
    if n <= 1:
        return [work(task) for task in tasks]
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, tasks))
