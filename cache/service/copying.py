"""Copying: what lies in files, into a socket, by the kernel."""

import asyncio
import os
from collections.abc import Sequence

from hiddenlake.cache.store.extents import Extent


class Copy:
    """Extents on their way into a socket, as fast as it takes them.

    done : becomes True when it has all, False where the connection has ended. Or raises: EOFError where a file ends too early,
        OSError.
    copied : bytes so far.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int, extents: Sequence[Extent]) -> None:
        """Begins. descriptor : of a socket that does not block, and that the loop does not know."""
        self._loop, self._descriptor = loop, descriptor
        self._left = list(reversed(extents))
        self._waits = False
        self.copied = 0
        self.done: asyncio.Future[bool] = loop.create_future()
        self._more()
        if not self.done.done():
            # No coroutine is woken for a part: a socket may take an answer in hundreds.
            loop.add_writer(descriptor, self._more)
            self._waits = True

    def stop(self) -> None:
        """Nothing more is copied, and nobody waits for it."""
        if self._waits:
            self._waits = False
            self._loop.remove_writer(self._descriptor)
        if not self.done.done():
            self.done.set_result(False)

    def _more(self) -> None:
        if self.done.done():  # whoever waited was cancelled
            return
        try:
            while self._left:
                file, offset, length = self._left.pop()
                sent = os.sendfile(self._descriptor, file.fileno(), offset, length)
                if not sent:
                    raise EOFError(f"a file ended {length} bytes before what was to be sent of it")
                self.copied += sent
                if sent < length:
                    self._left.append(Extent(file, offset + sent, length - sent))
                    return
        except BlockingIOError:
            self._left.append(Extent(file, offset, length))
            return
        except ConnectionError:
            pass
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(True)
        self.stop()
