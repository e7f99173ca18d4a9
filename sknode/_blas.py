"""Linear algebra of small matrices on one thread."""

from __future__ import annotations

import contextlib
import threading

from threadpoolctl import threadpool_limits  # scikit-learn brings it along

__all__ = ["OneThread", "one_thread"]


class OneThread(contextlib.ContextDecorator):
    """Keep the BLAS of numpy and scipy on one thread, within it or in a function.

    Threads that share a small matrix only wait for each other. The limit is that of the
    process: where several threads are in here, the first one sets it and the last one
    takes it back. Torch's own threads are left alone.
    """

    def __init__(self):
        self._lock, self._inside, self._limits = threading.Lock(), 0, None

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._limits = threadpool_limits(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *error):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


one_thread = OneThread()
