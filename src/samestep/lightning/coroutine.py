"""A function that is suspended in its midst, in whichever function it calls."""

import threading
from collections.abc import Callable
from typing import Any

import torch


class Closed(BaseException):
    """Raised where a coroutine is suspended that nothing will resume."""


class Coroutine:
    """Runs in a thread of its own, while the one that resumes it waits.

    So only one thread runs at a time, and what torch keeps for each thread (whether
    gradients are recorded, autocast) belongs to the coroutine.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._yielded: Any = None
        self._error: BaseException | None = None
        self._is_closed = False
        self._resumed, self._suspended = threading.Semaphore(0), threading.Semaphore(0)
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._is_waiting = True
        self._thread.start()

    def resume(self) -> Any:
        """Run on, and return what is yielded next; None when the function ends.

        Raises what the function raises.
        """
        self._is_waiting = False
        self._resumed.release()
        self._suspended.acquire()
        if self._error is not None:
            raise self._error
        return self._yielded

    def suspend(self, value: Any) -> None:
        """Yield a value: called by the function. Raises Closed."""
        self._yielded, self._is_waiting = value, True
        self._suspended.release()
        self._resumed.acquire()
        if self._is_closed:
            raise Closed

    def close(self) -> None:
        """End the thread, if the function is suspended."""
        if self._is_waiting:
            self._is_closed = True
            self._resumed.release()
            self._thread.join()

    def _run(self) -> None:
        self._resumed.acquire()
        try:
            if not self._is_closed:
                torch.set_num_threads(self._num_threads)
                self._function()
        except Closed:
            pass
        except BaseException as error:  # for the thread that waits
            self._error = error
        self._yielded = None
        self._suspended.release()
