"""The roll call among threads that play processes."""

import socket
import threading
import time

import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel.roll_call import MissingProcesses, roll_call


def _port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _call(numbers, count, timeout=5.0, hosts=(), port=None, counts=None):
    """Runs the roll call of some processes at once and returns what each one got: None or an error."""
    port = port or _port()
    results = {}

    def one(index, number):
        its_count = counts[index] if counts else count
        try:
            roll_call(f"localhost:{port}", its_count, number, timeout, hosts)
            results[index] = None
        except ConfigError as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(numbers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(len(numbers))]


def test_all_are_there():
    assert _call([0, 1, 2, 3], 4) == [None] * 4


def test_the_port_is_free_again_at_once():
    port = _port()
    assert _call([0, 1, 2], 3, port=port) == [None] * 3
    with socket.create_server(("", port)):
        pass


def test_those_who_came_learn_who_did_not():
    started = time.monotonic()
    errors = _call([0, 2], 4, timeout=0.7, hosts=("a", "b", "c", "d"))
    assert time.monotonic() - started < 5
    for error in errors:
        assert isinstance(error, MissingProcesses)
        assert "processes 1 (on b), 3 (on d) of 4 have not started within 0.7 s" in str(error)
        assert "2 (" in str(error).split("there are")[1]
        assert error.exit_code == 1, "2 would tell launchers that starting it again is useless"


def test_process_0_is_missing():
    (error,) = _call([1], 2, timeout=0.5)
    assert isinstance(error, MissingProcesses)
    assert "process 0" in str(error)
    assert "has not started within 0.5 s" in str(error)


@pytest.mark.parametrize(
    ("numbers", "counts", "says"),
    [
        ([0, 1, 1], [3, 3, 3], "number 1"),
        ([0, 1], [2, 3], "expects 3 processes"),
        ([0, 5], [3, 3], "has process number 5"),
    ],
)
def test_disagreements_are_errors_of_the_input(monkeypatch, numbers, counts, says):
    monkeypatch.setattr("os.getpid", threading.get_native_id)
    errors = [error for error in _call(numbers, counts[0], timeout=3, counts=counts) if error is not None]
    assert says in str(errors[0])
    assert not isinstance(errors[0], MissingProcesses)


def test_strangers_on_the_port_do_no_harm():
    port = _port()

    def knock():
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\n", b"diffusion_lm\n"):
            while True:
                try:
                    with socket.create_connection(("localhost", port), timeout=1) as stranger:
                        stranger.sendall(text)
                    break
                except OSError:
                    time.sleep(0.02)

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    (first,) = _call([0], 2, timeout=1.5, port=port)
    thread.join()
    assert "process 1 of 2 has not started" in str(first)


def test_the_run_before_may_still_hold_the_port():
    port = _port()
    server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    threading.Timer(0.5, server.close).start()
    assert _call([0, 1], 2, timeout=20, port=port) == [None, None]
