"""Several processes on one machine: their output never blocks them."""

import io
import sys

from launch import local_processes


class Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_worker_output_is_read_to_its_end_when_stdout_is_closed(monkeypatch):
    """A worker whose pipe is full would block forever."""
    pipe = io.BytesIO(b"step 1\nstep 2\nstep 3\n")
    monkeypatch.setattr(sys, "stdout", Closed())
    local_processes._forward(pipe, 0)
    assert pipe.read() == b""
