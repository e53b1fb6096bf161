"""The code runner: verdicts, limits, isolation and speed of start."""

import os
import time

import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation.code_runner import run_programs


@pytest.mark.parametrize(
    ("program", "status", "error"),
    [
        ("assert 1 + 1 == 2", "passed", ""),
        ("assert 1 + 1 == 3", "failed", "AssertionError"),
        ("def f(:", "failed", "SyntaxError"),
        ("raise SystemExit(0)", "failed", "SystemExit"),
        ("import os; os._exit(0)", "crashed", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", ""),
        ("input()", "failed", "EOFError"),
        ("print('x' * 10**6)", "passed", ""),
        ("x = bytearray(8 << 30)", "failed", "MemoryError"),
        ("open('big', 'wb').write(b'0' * (4 << 20))", "failed", "OSError"),
        ("def f(n): return f(n + 1)\nf(0)", "failed", "RecursionError"),
        ("import numpy", "failed", "ModuleNotFoundError"),
        ("import os\nassert not os.listdir('.')\nopen('x', 'w').write('1')", "passed", ""),
    ],
)
def test_verdicts(program, status, error):
    # Twice in one worker: what the first program does must not reach the second.
    for result in run_programs([program, program + "\n"], workers=1):
        assert (result.status, result.error.split(":")[0]) == (status, error)


def test_an_endless_loop_is_stopped_with_its_children(tmp_path):
    mark = tmp_path / "alive"
    program = f"""
import os, time
if os.fork() == 0:
    time.sleep(1.5)
    open({str(mark)!r}, "w")
while True:
    pass
"""
    started = time.monotonic()
    (result,) = run_programs([program], timeout_s=0.5)
    assert result.status == "timeout"
    assert time.monotonic() - started < 1.4
    time.sleep(1.6)
    assert not mark.exists()


def test_cpu_time_ends_a_loop_whatever_the_wall_clock_allows():
    (result,) = run_programs(["while True: pass"], cpu_s=1)
    assert result.status == "timeout"
    assert result.seconds < 30


def test_a_murdered_worker_costs_one_program():
    results = run_programs(["import os; os.kill(os.getppid(), 9)", "x = 1", "y = 2"], workers=1)
    assert [result.status for result in results] == ["crashed", "passed", "passed"]


def test_results_keep_the_order_and_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    programs = [f"assert {i} % 3" for i in range(60)] + ["import os; assert 'SECRET_TOKEN' not in os.environ"]
    results = run_programs(programs, workers=2)
    assert [result.passed for result in results] == [bool(i % 3) for i in range(60)] + [True]
    assert "SECRET_TOKEN" in os.environ


def test_bad_arguments():
    assert run_programs([]) == []
    with pytest.raises(ConfigError, match="timeout_s"):
        run_programs(["1"], timeout_s=0)
