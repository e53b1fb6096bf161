"""Checks that all processes have started, before JAX connects them, and names those that have not.

If a process never starts, JAX aborts all others after its timeout, with a stack trace that names none. So process 0
first listens on the coordinator's port, which is free until JAX binds it, and the other processes connect and identify
themselves. After the time limit, process 0 sends the list of missing processes to those that connected.

The protocol is one line each way: `diffusion_lm NUMBER COUNT PID HOST` from a process, then `diffusion_lm go`, or
`missing` or `wrong` with a message, from process 0. Any other line is from another program and is ignored.
"""

import os
import socket
import sys
import time

from diffusion_lm.core.errors import ConfigError

_MAGIC = "diffusion_lm"
_GO, _MISSING, _WRONG = "go", "missing", "wrong"
_LONGEST_LINE = 1 << 16
_NOTE_AFTER = 15.0
"""Seconds after which process 0 prints the processes it is waiting for."""


class MissingProcesses(ConfigError):
    """Some processes did not start in time. Unlike an invalid input, this may succeed on another attempt."""

    exit_code = 1


def roll_call(address: str, count: int, number: int, timeout: float, hosts: tuple[str, ...] = ()) -> None:
    """Returns once all `count` processes have called it.

    Args:
      address: `HOST:PORT` of the coordinator, which is process 0.
      count: number of processes.
      number: of this process, from 0.
      timeout: seconds to wait for the others.
      hosts: the host of each process, if known; only for the message.

    Raises:
      MissingProcesses: some processes did not call it in time.
      ConfigError: two processes have the same number, or different counts.
    """
    deadline = time.monotonic() + timeout
    if number == 0:
        _collect(int(address.rsplit(":", 1)[1]), count, timeout, deadline, hosts)
    else:
        _report(address, count, number, timeout, deadline)


def _collect(port: int, count: int, timeout: float, deadline: float, hosts: tuple[str, ...]) -> None:
    there = {0: _myself()}
    connections: dict[int, socket.socket] = {}
    note_at, wrong = time.monotonic() + _NOTE_AFTER, ""
    with _listen(port, deadline) as server:
        while len(there) < count and not wrong and time.monotonic() < deadline:
            server.settimeout(max(0.01, min(1.0, deadline - time.monotonic())))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                if time.monotonic() > note_at:
                    print(f"waiting for {_names(there, count, hosts)}", file=sys.stderr, flush=True)
                    note_at = time.monotonic() + 60
                continue
            said = _read_words(connection, seconds=5.0)
            if len(said) != 4 or not (said[0] + said[1]).isdigit():
                connection.close()  # another program, such as a port scanner
                continue
            number, process = int(said[0]), f"{said[3]}, pid {said[2]}"
            wrong = _disagreement(there, count, number, int(said[1]), process)
            there.setdefault(number, process)
            connections[len(connections) if wrong else number] = connection
    verdict, text = _GO, ""
    if wrong:
        verdict, text = _WRONG, wrong
    elif len(there) < count:
        verdict, text = _MISSING, _missing(there, count, timeout, hosts)
    for connection in connections.values():
        _dismiss(connection, f"{_MAGIC} {verdict} {text}\n")
    _conclude(verdict, text)


def _disagreement(there: dict[int, str], count: int, number: int, its_count: int, process: str) -> str:
    if its_count != count:
        return f"process {number} ({process}) expects {its_count} processes and process 0 ({there[0]}) expects {count}"
    if number >= count:
        return f"{process} has process number {number}, and the numbers are 0 to {count - 1}"
    if there.get(number, process) != process:
        return f"two processes have number {number}: {there[number]} and {process}"
    return ""


def _report(address: str, count: int, number: int, timeout: float, deadline: float) -> None:
    host, port = address.rsplit(":", 1)
    answered = False
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)
        except OSError:
            time.sleep(0.1)
            continue
        with connection:
            connection.sendall(f"{_MAGIC} {number} {count} {os.getpid()} {socket.gethostname()}\n".encode())
            # Process 0 may have started its timeout later than this process, so wait longer for its answer.
            said = _read_words(connection, seconds=2 * timeout + 5.0)
        if said and said[0] in (_GO, _MISSING, _WRONG):
            _conclude(said[0], " ".join(said[1:]))
            return
        answered = True  # by the previous run, which still holds the port, or by one that runs without this process
        time.sleep(0.5)
    how = "does not wait for other processes" if answered else "has not started"
    _conclude(
        _MISSING,
        f"process 0, the coordinator at {address}, {how} within {timeout:g} s "
        f"(this is process {number} of {count}, {_myself()})",
    )


def _conclude(verdict: str, text: str) -> None:
    if verdict == _MISSING:
        fix = "Start the command on every host, check its output there, or wait longer (DIFFUSION_LM_START_TIMEOUT)."
        raise MissingProcesses(text, where="environment", fix=fix)
    if verdict == _WRONG:
        raise ConfigError(text, where="environment", fix="Use a different number and the same count for every process.")


def _myself() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def _missing(there: dict[int, str], count: int, timeout: float, hosts: tuple[str, ...]) -> str:
    came = ", ".join(f"{number} ({there[number]})" for number in sorted(there)[:8])
    more = f" and {len(there) - 8} more" if len(there) > 8 else ""
    verb = "has" if count - len(there) == 1 else "have"
    return f"{_names(there, count, hosts)} {verb} not started within {timeout:g} s; there are {came}{more}"


def _names(there: dict[int, str], count: int, hosts: tuple[str, ...]) -> str:
    missing = [number for number in range(count) if number not in there]
    known = len(hosts) == count
    names = [f"{number} (on {hosts[number]})" if known else str(number) for number in missing[:16]]
    more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
    return f"process{'es' if len(missing) > 1 else ''} {', '.join(names)}{more} of {count}"


def _listen(port: int, deadline: float) -> socket.socket:
    """Returns a socket on the coordinator's port, once it is free: the previous run may still hold it."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"cannot listen on port {port} of {socket.gethostname()}: {error}",
                    where="JAX_COORDINATOR_ADDRESS",
                    fix="Use another port.",
                ) from error
            time.sleep(0.1)


def _read_words(connection: socket.socket, *, seconds: float) -> list[str]:
    """Returns the words of a line after `diffusion_lm`; none for a line of another program."""
    found, deadline = b"", time.monotonic() + seconds
    try:
        while not found.endswith(b"\n") and len(found) < _LONGEST_LINE:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            part = connection.recv(4096)
            if not part:
                break
            found += part
    except OSError:
        pass
    words = found.decode(errors="replace").split()
    return words[1:] if found.endswith(b"\n") and words[:1] == [_MAGIC] else []


def _dismiss(connection: socket.socket, line: str) -> None:
    """Answers and lets the other side close first: the side that closes first keeps its port in TIME_WAIT."""
    try:
        connection.sendall(line.encode())
        connection.settimeout(2.0)
        connection.recv(1)
    except OSError:
        pass  # the process has ended; JAX will report it
    finally:
        connection.close()
