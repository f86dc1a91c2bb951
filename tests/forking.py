"""Programs of this repository as a user runs them, many for the price of one start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
Command = Callable[..., "tuple[int, str, str]"]

# Importing torch takes seconds: one process imports everything and forks for each command line, whose child
# then runs `python -m program` as if it had started it. The collector leaves what was imported alone, and the
# child ends without taking it apart: either would copy the memory that it shares, in two seconds of CPU time.
SERVER = """
import atexit, gc, json, os, runpy, sys, threading, traceback
{before}

gc.freeze()
for line in sys.stdin:
    folder, here, program, *arguments = json.loads(line)
    if not (child := os.fork()):
        for descriptor, name in ((1, "out"), (2, "error")):
            os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(here)
        sys.argv = [program, *arguments]
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
try:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
    status = 0
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    status = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""


@contextmanager
def forking(said: Path, before: str) -> Iterator[Command]:
    """Gives what runs `python -m program argument ...` here or in the folder `here`: its exit status, and its
    stdout and stderr.

    said    a folder for these
    before  Python that every program begins with: what to import once
    """
    server = [sys.executable, "-c", SERVER.format(before=before)]
    with subprocess.Popen(server, env=ENVIRONMENT, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answer = process.stdin, process.stdout

        def run(program: str, *arguments: object, here: Path | str = ".") -> tuple[int, str, str]:
            ask.write(json.dumps([str(said), str(here), program, *map(str, arguments)]) + "\n")
            ask.flush()
            return int(answer.readline()), (said / "out").read_text(), (said / "error").read_text()

        yield run
        ask.close()
