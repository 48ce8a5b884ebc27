"""Work done ahead in one background thread, with a bounded queue."""

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

from sae_core.errors import UserError

T = TypeVar("T")


def prefetch(iterable: Iterable[T], size: int) -> Iterator[T]:
    """Yield the items of ``iterable`` in order while a thread computes ``size`` of them ahead.

    An exception of the source is raised at the place where its item would have come. When the
    consumer stops early (``close()``, ``break`` and collection, an exception), the thread finishes
    the item it is at, closes the source and ends.

    Args:
        iterable: the source; it is iterated in the background thread only.
        size: how many finished items may wait (so at most ``size + 2`` exist at once). 0: no
            thread, the items are computed when they are asked for.

    Raises:
        UserError: ``size`` is negative.
    """
    if size < 0:
        raise UserError(f"prefetch size must be 0 or more, got {size}.")
    return _prefetched(iterable, size) if size else iter(iterable)


def _prefetched(iterable: Iterable[T], size: int) -> Iterator[T]:
    waiting: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=size)
    stop = threading.Event()
    thread = threading.Thread(
        target=_produce, args=(iterable, waiting, stop), name="prefetch", daemon=True
    )
    thread.start()
    try:
        while True:
            kind, item = waiting.get()
            if kind == "error":
                raise item  # type: ignore[misc]
            if kind == "end":
                return
            yield item  # type: ignore[misc]
            del item  # the consumer's reference must be the only one while the next is awaited
    finally:
        stop.set()
        # Emptying the queue wakes a producer that waits for room; it puts at most once more,
        # for which there is room now, because it looks at `stop` before every put.
        while not waiting.empty():
            waiting.get_nowait()
        thread.join()


def _produce(iterable: Iterable[T], waiting: queue.Queue, stop: threading.Event) -> None:
    last: tuple[str, BaseException | None] = ("end", None)
    try:
        iterator = iter(iterable)
        try:
            for item in iterator:
                if stop.is_set():
                    return
                waiting.put(("item", item))
                del item
        finally:
            if isinstance(iterator, Generator):
                iterator.close()
    except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
        last = ("error", error)
    if not stop.is_set():
        waiting.put(last)
