"""Watches a command on the workers of a TPU, and says what its end means: done, failed, or to be started again."""

import enum
import sys
from collections.abc import Mapping

from launch import workers
from launch.cloud_tpu import CloudTpu, Phase

STATE_LAG_SECONDS = 60.0
"""How long Cloud may go on calling a TPU ready whose machines are gone."""
ENDING_POLLS = 30
"""How often the other workers are asked whether they have ended too."""


class Verdict(enum.Enum):
    """What the workers' exit codes mean for the job."""

    DONE = "done"
    RUNNING = "running"
    ENDING = "some have ended"
    AGAIN = "start it again"
    FAILED = "failed"


def follow(tpu: CloudTpu, count: int) -> tuple[Verdict, dict[str, str]]:
    """Follows the log of the first worker until the command has ended on all workers, or the TPU is gone."""
    lines, polls = "+1", 0
    while True:
        tpu.follow(workers.follow(lines))
        state = tpu.describe()
        if state.phase is not Phase.READY:
            tpu.shell.say(f"{tpu.name} is {state}")
            return Verdict.AGAIN, {}
        expected = "".join(f"diffusion_lm worker {number}: 0\n" for number in range(count))
        found = workers.read_outcomes(tpu.ssh(workers.outcome(), expect=expected))
        verdict = judge(found, count)
        if verdict not in (Verdict.RUNNING, Verdict.ENDING):
            return verdict, found
        polls = polls + 1 if verdict is Verdict.ENDING else 0
        if polls >= ENDING_POLLS:
            tpu.shell.say("some workers do not end; they are stopped")
            tpu.ssh(workers.stop())
        lines = "20"  # the link broke and the command goes on
        tpu.shell.sleep(10)


def judge(found: Mapping[str, str], count: int) -> Verdict:
    """Returns what exit codes (or `running`, `gone`) by worker say about a command on `count` workers."""
    codes = set(found.values())
    if workers.RUNNING in codes:
        return Verdict.RUNNING if codes == {workers.RUNNING} else Verdict.ENDING
    if len(found) < count or codes & {"75", workers.GONE}:
        # 75 says "saved, start me again". A worker without exit code was rebooted; the others then fail in their turn.
        return Verdict.FAILED if "2" in codes else Verdict.AGAIN
    return Verdict.DONE if codes == {"0"} else Verdict.FAILED


def lost(tpu: CloudTpu, slices: int) -> bool:
    """Whether the TPU, or a slice of it, has been taken away; asks twice, because Cloud takes a while to say so."""
    for seconds in (0.0, STATE_LAG_SECONDS):
        tpu.shell.sleep(seconds)
        if tpu.describe().phase is not Phase.READY or tpu.lost_node(slices) is not None:
            return True
    return False


def clear(tpu: CloudTpu, slices: int) -> None:
    """Before another start: leftovers are stopped; of a TPU that has lost a part, nothing is kept."""
    if tpu.describe().phase is not Phase.READY:
        return
    lost = tpu.lost_node(slices)
    if lost is not None:
        tpu.shell.say(f"a slice is {lost}: deleting the others to ask for all of them again")
        tpu.delete()
    else:
        tpu.ssh(workers.stop())


def conclude(tpu: CloudTpu, verdict: Verdict, found: Mapping[str, str]) -> int:
    """Says how the command ended, with the last lines of the workers where it failed; returns the exit code."""
    if verdict is Verdict.DONE:
        tpu.shell.say("done on all workers")
        return 0
    if verdict is Verdict.AGAIN:
        tpu.shell.say("the command was interrupted; the same command goes on from its run folder")
        return 75
    failed = {name: code for name, code in found.items() if code not in ("0", "75", workers.GONE)}
    print(tpu.ssh(workers.last_lines()), end="", file=sys.stderr)
    tpu.shell.say("failed on " + ", ".join(f"{name} ({code})" for name, code in sorted(failed.items())))
    return next((int(code) for code in failed.values() if code.isdigit()), 1)
