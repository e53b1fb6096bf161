"""Processes of `bench startup`: which are started, with which cache, and errors."""

import sys

import pytest

from diffusion_lm.bench import startup
from diffusion_lm.core.errors import ConfigError


def test_warm_runs_the_command_of_cold_with_its_cache(monkeypatch):
    started = []
    monkeypatch.setattr(startup, "_run", lambda command, cache=None: started.append((tuple(command[3:]), cache)))
    seconds = startup.measure_startup(["bench", "train", "--rounds", "0"], rounds=2)
    assert list(seconds) == [startup.IMPORT, startup.HELP, startup.COLD, startup.WARM]
    assert all(len(times) == 2 for times in seconds.values())
    steps = [cache for command, cache in started if command == ("bench", "train", "--rounds", "0")]
    assert steps[0] == steps[1] != steps[2] == steps[3], "each round begins with an empty cache"
    assert [command for command, _ in started][1] == ("--help",)


def test_the_error_of_a_failed_process_has_its_last_line_of_stderr(monkeypatch):
    monkeypatch.setattr(startup, "COMMAND", (sys.executable, "-c", "raise SystemExit('no such flag')"))
    with pytest.raises(ConfigError, match=r"failed: no such flag"):
        startup.measure_startup([], rounds=1)
