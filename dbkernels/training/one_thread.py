"""One thread at a time, where a second one would spoil what the first one does."""

import threading


class OneThread:
    """A context that a thread may enter again, and that refuses another one meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise ValueError(
                "a trainer must be used by one thread at a time, got "
                f"{threading.current_thread().name} while another is in it"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()
