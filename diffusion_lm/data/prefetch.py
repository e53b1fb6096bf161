"""Prefetches batches in a background thread."""

import queue
import threading
from collections.abc import Callable, Iterator

from diffusion_lm.core.types import Batch


class BatchIterator(Iterator[Batch]):
    """Iterates over batches from a position on, prefetching in a background thread. Close it, or use `with`.

    Attributes:
      position: number of the batch that `next` returns, counted from the start of the run; the only state to save.
    """

    def __init__(self, read: Callable[[int], Batch], position: int = 0, prefetch: int = 2):
        """Starts the thread.

        Args:
          read: returns batch `index`.
          position: number of the first batch.
          prefetch: number of batches to prefetch; 0 = no thread, `next` calls `read`.
        """
        self.position = position
        self._read = read
        self._stop = threading.Event()
        self._ready: queue.Queue = queue.Queue(maxsize=max(prefetch, 1))
        self._thread: threading.Thread | None = None
        if prefetch > 0:
            self._thread = threading.Thread(target=self._work, args=(position,), name="data-prefetch", daemon=True)
            self._thread.start()

    def __next__(self) -> Batch:
        """Returns the next batch; an error in the background thread is raised here."""
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get() if self._thread else self._read(self.position)
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.position += 1
        return item

    def close(self) -> None:
        """Stops the background thread and drops prefetched batches."""
        self._stop.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self, index: int) -> None:
        while not self._stop.is_set():
            try:
                item: Batch | BaseException = self._read(index)
            except BaseException as error:
                item = error
            # A timeout, so that the thread ends after `close` even if nobody takes the batch.
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            index += 1
