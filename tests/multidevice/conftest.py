"""Tests of this folder see eight devices, whatever the rest of the session sees.

The number of CPU devices is fixed when JAX starts, so each test file here runs in a process of its own: the session
starts it once, with the tests that were selected, and reports its results test by test as if they had run here.
Plain `pytest`, pytest-xdist, `-k` and node ids all work.
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

import pytest

DEVICES = 8
HERE = pathlib.Path(__file__).parent
INSIDE = "DIFFUSION_LM_EIGHT_DEVICES"


@functools.cache
def _results(root: pathlib.Path, node_ids: tuple[str, ...]) -> tuple[dict[str, tuple[str, str]], str]:
    """Runs the tests in a process with eight devices; returns name -> (outcome, text), and all that was printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    flags = [f for f in environment.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    environment["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={DEVICES}"])
    # A device that waits for the others holds a thread: enough of them, or two collectives wait for each other.
    environment |= {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(4 * DEVICES), INSIDE: "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        # The session has selected the tests; its marks are not asked again.
        options = ["-q", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *node_ids]
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        results = {}
        for case in cases:
            bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
            outcome = "passed" if not bad else "skipped" if bad[0].tag == "skipped" else "failed"
            results[case.get("name", "")] = (outcome, (bad[0].text or bad[0].get("message", "")) if bad else "")
    return results, run.stdout + run.stderr


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Reports the result of the test in the process with eight devices (and runs it as usual inside of that one)."""
    if HERE not in item.path.parents or os.environ.get(INSIDE):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    same_file = tuple(other.nodeid for other in item.session.items if other.path == item.path)
    results, printed = _results(item.config.rootpath, same_file)
    outcome, text = results.get(item.name, ("failed", f"the process with {DEVICES} devices did not run it:\n{printed}"))
    longrepr = (str(item.path), 0, text) if outcome == "skipped" else text or None
    for phase in ("setup", "call", "teardown"):
        happened = outcome if phase == "call" else "passed"
        item.ihook.pytest_runtest_logreport(
            report=pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords=dict.fromkeys(item.keywords, 1),
                outcome=happened,
                longrepr=longrepr if phase == "call" else None,
                when=phase,
            )
        )
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
