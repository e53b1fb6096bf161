"""A fake gcloud, kubectl and sbatch: records its arguments and answers as the test has planned.

The folder $FAKE_FOLDER holds:
    calls.jsonl      a line a call: the program, its arguments, its standard input
    answers.json     regular expression over the arguments -> answers, one a call, each with code, stdout, stderr;
                     what is not planned succeeds, and `describe` says whether `create` or `delete` came last
    workers/N/       the home of worker N; `ssh` runs its command there and `scp` copies there
    bin/             programs that the workers find
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

FOLDER = pathlib.Path(os.environ["FAKE_FOLDER"])


def main(program, arguments):
    stdin = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    with open(FOLDER / "calls.jsonl", "a") as file:
        file.write(json.dumps({"program": program, "arguments": arguments, "stdin": stdin}) + "\n")
    answer = planned(" ".join(arguments))
    if answer is not None:
        sys.stdout.write(answer.get("stdout", ""))
        sys.stderr.write(answer.get("stderr", ""))
        return answer.get("code", 0)
    if program == "gcloud":
        flags = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
        verb = arguments[3]
        if verb == "ssh":
            return ssh(flags["--command"], flags["--worker"])
        if verb == "scp":
            return scp([argument for argument in arguments[4:] if not argument.startswith("--")])
        if verb == "create":
            (FOLDER / "there").touch()
        if verb == "describe":
            return describe(queued=arguments[2] == "queued-resources")
        if verb == "delete":
            (FOLDER / "there").unlink(missing_ok=True)
            shutil.rmtree(FOLDER / "workers", ignore_errors=True)
    return 0


def planned(line):
    path = FOLDER / "answers.json"
    plans = json.loads(path.read_text()) if path.exists() else {}
    for pattern, answers in plans.items():
        if re.search(pattern, line) and answers:
            answer = answers.pop(0)
            path.write_text(json.dumps(plans))
            return answer
    return None


def describe(queued):
    if not (FOLDER / "there").exists():
        sys.stderr.write("ERROR: (gcloud.x) NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found\n")
        return 1
    print('{"state": {"state": "ACTIVE"}}' if queued else '{"state": "READY"}')
    return 0


def homes():
    for number in range(int(os.environ["FAKE_WORKERS"])):
        home = FOLDER / "workers" / str(number)
        home.mkdir(parents=True, exist_ok=True)
        yield home


def ssh(command, worker):
    code = 0
    for home in homes():
        if worker in ("all", home.name):
            path = f"{FOLDER / 'bin'}:/usr/bin:/bin"
            environment = {"HOME": str(home), "PATH": path, "FAKE_FOLDER": str(FOLDER), "WORKER": home.name}
            code = max(code, subprocess.call(["bash", "-c", command], cwd=home, env=environment))
    return code


def scp(paths):
    folder = paths.pop().split(":", 1)[1]
    for home in homes():
        for path in paths:
            shutil.copy(path, home / folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[0]).name, sys.argv[1:]))
