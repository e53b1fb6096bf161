"""Watches a command on the workers of a TPU and decides how it ended: done, failed, or to be restarted."""

import enum
import sys
from collections.abc import Mapping

from launch import workers
from launch.cloud_tpu import CloudTpu, Phase

STATE_LAG_SECONDS = 60.0
"""Maximum delay until Cloud reports that a preempted TPU is no longer ready."""
ENDING_POLLS = 30
"""Number of polls for the other workers to end after the first one has, before they are stopped."""


class Verdict(enum.Enum):
    """State of the job, derived from the exit codes of the workers."""

    DONE = "done"
    RUNNING = "running"
    ENDING = "some workers have ended"
    RESTART = "to be restarted"
    FAILED = "failed"


def follow(tpu: CloudTpu, count: int) -> tuple[Verdict, dict[str, str]]:
    """Follows the log of the first worker until the command has ended on all workers, or the TPU is gone."""
    lines, polls = "+1", 0
    while True:
        tpu.follow(workers.follow(lines))
        state = tpu.describe()
        if state.phase is not Phase.READY:
            tpu.shell.say(f"{tpu.name} is {state}")
            return Verdict.RESTART, {}
        expected = "".join(f"diffusion_lm worker {number}: 0\n" for number in range(count))
        found = workers.read_outcomes(tpu.ssh(workers.outcome(), expect=expected))
        verdict = judge(found, count)
        if verdict not in (Verdict.RUNNING, Verdict.ENDING):
            return verdict, found
        polls = polls + 1 if verdict is Verdict.ENDING else 0
        if polls >= ENDING_POLLS:
            tpu.shell.say("some workers do not end; stopping them")
            tpu.ssh(workers.stop())
        lines = "20"  # the connection broke, but the command is still running
        tpu.shell.sleep(10)


def judge(found: Mapping[str, str], count: int) -> Verdict:
    """Returns the state of a command on `count` workers, from the exit code (or `running`, `gone`) of each worker."""
    codes = set(found.values())
    if workers.RUNNING in codes:
        return Verdict.RUNNING if codes == {workers.RUNNING} else Verdict.ENDING
    if len(found) < count or codes & {"75", workers.GONE}:
        # 75 means that a checkpoint was saved and the command should be restarted. A worker without an exit code was
        # rebooted; the other workers then fail too, so their codes do not count. Code 2 is invalid input: no restart.
        return Verdict.FAILED if "2" in codes else Verdict.RESTART
    return Verdict.DONE if codes == {"0"} else Verdict.FAILED


def lost(tpu: CloudTpu, slices: int) -> bool:
    """Returns whether the TPU or a slice of it was lost; checks twice, because Cloud reports it with a delay."""
    for seconds in (0.0, STATE_LAG_SECONDS):
        tpu.shell.sleep(seconds)
        if tpu.describe().phase is not Phase.READY or tpu.lost_node(slices) is not None:
            return True
    return False


def clear(tpu: CloudTpu, slices: int) -> None:
    """Prepares a restart: stops remaining processes, or deletes the TPU if one of its slices was lost."""
    if tpu.describe().phase is not Phase.READY:
        return
    lost = tpu.lost_node(slices)
    if lost is not None:
        tpu.shell.say(f"a slice is {lost}: deleting all slices and requesting them again")
        tpu.delete()
    else:
        tpu.ssh(workers.stop())


def conclude(tpu: CloudTpu, verdict: Verdict, found: Mapping[str, str]) -> int:
    """Reports how the command ended, with the last log lines of failed workers; returns the exit code."""
    if verdict is Verdict.DONE:
        tpu.shell.say("done on all workers")
        return 0
    if verdict is Verdict.RESTART:
        tpu.shell.say("the command was interrupted; run the same command again to resume from its run directory")
        return 75
    failed = {name: code for name, code in found.items() if code not in ("0", "75", workers.GONE)}
    print(tpu.ssh(workers.last_lines()), end="", file=sys.stderr)
    tpu.shell.say("failed on " + ", ".join(f"{name} ({code})" for name, code in sorted(failed.items())))
    return next((int(code) for code in failed.values() if code.isdigit()), 1)
