"""Handles a stdout or stderr that is closed while a verb runs (`train ... 2>&1 | head`).

stderr carries progress. If it cannot be written, the verb continues without it.
stdout carries results. If the results are also in files, the verb continues. If stdout is the only output of the verb,
it stops with `environment.EXIT_OUTPUT_CLOSED`, the exit code of a process killed by SIGPIPE.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_STDIN, _STDOUT, _STDERR = 0, 1, 2


class OutputClosed(BaseException):
    """stdout was closed, and stdout is the only output of the verb."""


class GuardedStream:
    """A text stream that tolerates a closed reader. All other attributes are those of the wrapped stream.

    Attributes:
      lost: whether the reader is gone; text written after that is discarded.
      needed: whether to raise `OutputClosed` once the reader is gone.
    """

    def __init__(self, stream: TextIO | None, descriptor: int, *, any_error: bool):
        self.lost, self.needed = stream is None, False
        self._descriptor, self._any_error = descriptor, any_error
        # Python sets sys.stdout to None if the descriptor was closed before the process started.
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text`, or discards it if the reader is gone."""
        if not self.lost:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        self._end()
        return len(text)

    def flush(self) -> None:
        """Flushes the buffer; errors are handled as in `write`."""
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
            # The interpreter flushes the buffer again at exit. On a closed descriptor that would be exit code 120.
            if self._stream.fileno() == self._descriptor:
                _redirect(self._descriptor)


@contextlib.contextmanager
def guarded() -> Iterator[GuardedStream]:
    """Wraps `sys.stdout` and `sys.stderr` while a command runs; yields the wrapped stdout."""
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened would get this descriptor and receive what libraries write to stderr.
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
    """Points a file descriptor at the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
