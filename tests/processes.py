"""Processes for tests: forked from one that has imported the package, so that each starts at once."""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # conftest is not imported: it makes a folder for the session

_context = multiprocessing.get_context("forkserver")
# what each process finds imported; none of it may start a thread or use autograd, which are lost in a fork
_context.set_forkserver_preload(
    ["diffusion_adagn.cli.main", "diffusion_adagn.training.train", "diffusion_adagn.experiments.sweep"]
)

MAIN = "import sys; from diffusion_adagn.cli.main import main; sys.exit(main(sys.argv[1:]))"


class Process:
    """`code` with `argv` in a process of its own, its output in the file `log`. `variables` are added to the environment."""

    def __init__(self, code, argv, log, **variables):
        self.log = Path(log)
        environment = dict(os.environ) | {name: str(value) for name, value in variables.items()}
        _start_server()
        self._process = _context.Process(target=_run, args=(code, [str(a) for a in argv], environment, str(log)))
        self._process.start()
        self.pid = self._process.pid

    def running(self):
        return self._process.is_alive()

    def wait(self, timeout=300):
        """Its exit status, -N where signal N ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"not done after {timeout} s: {self.printed()[-2000:]}")
        return self._process.exitcode

    def printed(self):
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def signal(self, number):
        os.kill(self.pid, number)


def ranks(count, argv, folder, code=MAIN, timeout=300):
    """`adagn ARGV` as `count` processes of one group, as torchrun starts them. What the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        started.append(Process(code, argv, Path(folder) / f"rank-{rank}.log", **group))
    statuses = [process.wait(timeout) for process in started]
    assert statuses == [0] * count, "\n".join(process.printed()[-3000:] for process in started)
    return started[0].printed()


def _start_server():
    """The one that is forked imports this package, and not an installed one."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(code, argv, environment, log):
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *argv]
    status = 0
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads now and then abort a normal exit
