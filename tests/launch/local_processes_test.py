"""Processes of one machine: their output never holds them up."""

import io
import sys

from launch import local_processes


class Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_the_output_of_a_worker_is_read_to_its_end_without_a_reader_of_ours(monkeypatch):
    """A worker whose pipe is full would wait for ever."""
    pipe = io.BytesIO(b"step 1\nstep 2\nstep 3\n")
    monkeypatch.setattr(sys, "stdout", Closed())
    local_processes._forward(pipe, 0)
    assert pipe.read() == b""
