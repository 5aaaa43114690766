"""The thread on which a model lives, from its loading to its last forward."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, final

Result = TypeVar("Result")


@final
class ModelThread:
    """One thread that does all the tensor work of one model, in turn.

    A model is loaded and tried on the thread that runs it, and not only for order's sake: OpenMP keeps a team of helper
    threads for every thread that has ever used several cores, and as soon as all teams together outnumber the cores
    their members fall asleep between two operations. Small decoding steps then take nearly twice as long.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="agentmesh-engine", initializer=self._begun)

    @property
    def alive(self) -> bool:
        """Whether it can still do something; a thread that has nothing to do yet is not made before its first work."""
        return self._thread is None or self._thread.is_alive()

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The thread as an event loop wants it."""
        return self._pool

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Do something when its turn comes."""
        return self._pool.submit(work)

    def do(self, work: Callable[[], Result]) -> Result:
        """Do something, and wait for it; called on another thread. Raises what the work raises."""
        return self._pool.submit(work).result()

    def close(self, *, wait: bool = True) -> None:
        """Do nothing more; waits for the work that is running, unless told not to."""
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _begun(self) -> None:
        self._thread = threading.current_thread()
