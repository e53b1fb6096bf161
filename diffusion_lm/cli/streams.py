"""Standard output and error whose reader may go away while a verb runs (`train ... 2>&1 | head`).

stderr carries progress, which is never worth a failure: when it cannot be written, the verb runs on without it.
stdout carries results. Where they are also in files, the verb runs on; where they are the only product of the verb, it
stops at once with `environment.EXIT_OUTPUT_CLOSED`, as a process that SIGPIPE ended.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

_STDIN, _STDOUT, _STDERR = 0, 1, 2


class OutputClosed(BaseException):
    """stdout was closed and what it should have carried is the product of the verb."""


class GuardedStream:
    """A text stream that survives the loss of its reader. Everything but writing is the stream's own.

    Attributes:
      lost: whether the reader is gone. What is written from then on is dropped.
      needed: whether a lost stream is the end of the verb (`OutputClosed`).
    """

    def __init__(self, stream: Any, descriptor: int, *, any_error: bool):
        self.lost, self.needed = stream is None, False
        self._descriptor, self._any_error = descriptor, any_error
        # A descriptor that was closed before the start. Python has no stream for it then.
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text`, or drops it where nobody reads any more."""
        if not self.lost:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        self._end()
        return len(text)

    def flush(self) -> None:
        """Hands over what is buffered."""
        if not self.lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)
                self._end()

    def _end(self) -> None:
        if self.needed:
            raise OutputClosed

    def _lose(self, error: OSError) -> None:
        if not (self._any_error or error.errno == errno.EPIPE or isinstance(error, BrokenPipeError)):
            raise error
        self.lost = True
        with contextlib.suppress(OSError, ValueError):
            # What is still buffered is written again when the interpreter ends, which would be exit code 120.
            if self._stream.fileno() == self._descriptor:
                _redirect(self._descriptor)


@contextlib.contextmanager
def guarded() -> Iterator[GuardedStream]:
    """Guards `sys.stdout` and `sys.stderr` for the length of a command; yields the guarded stdout."""
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened would get this number, and with it what libraries write to stderr.
            _redirect(descriptor)
    before = sys.stdout, sys.stderr
    stdout: Any = GuardedStream(sys.stdout, _STDOUT, any_error=False)
    stderr: Any = GuardedStream(sys.stderr, _STDERR, any_error=True)
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield stdout
    finally:
        sys.stdout, sys.stderr = before


def _redirect(descriptor: int) -> None:
    """Makes a file descriptor one of the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
