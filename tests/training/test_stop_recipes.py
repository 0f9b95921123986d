"""A run under a launcher is asked to stop: it saves whatever becomes of the launcher, and the scripts of docs/scaling.md see it."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from diffusion_adagn.runs.layout import RunFolder
from diffusion_adagn.runtime import launcher, stopping
from diffusion_adagn.training.stop_signal import StopSignal

pytestmark = pytest.mark.serial
BY_SRUN, BY_THE_SCRIPT = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/scaling.md").read_text(), re.M | re.S)

# in Python, as the real one: bash cannot trap a signal that is ignored when it starts
WORKER = f"""#!{sys.executable} -S
import os, signal, sys, time

def leave(status):
    with open(os.environ["DIFFUSION_ADAGN_STATUS"], "w") as file:
        print(status, file=file)
    sys.exit(status)

def save(*_):
    time.sleep(0.2)
    leave(75)

signal.signal(signal.SIGUSR1, save)
with open("worker", "w") as file:
    file.write(str(os.getpid()))
for _ in range(3000):
    if os.path.exists("done"):
        leave(0)
    time.sleep(0.02)
"""
STAND_INS = {
    # as torchrun: USR1 ends it unless it is ignored, every failed worker is a 1
    "torchrun": "#!/bin/bash\necho $$ > launcher\nworker & wait $! || exit 1\n",
    "srun": '#!/bin/bash\nexec "$@"\n',
    "scontrol": '#!/bin/bash\nif [ "$1" = show ]; then echo host0; else echo "$@" >> scontrol.log; fi\n',
    "worker": WORKER,
}


def until(condition, timeout=60):
    """The first value of condition() that is true."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return value


def started(script, folder, **stand_ins):
    """The batch script in `folder`, beside stand-ins for what it calls."""
    for name, text in (STAND_INS | stand_ins).items():
        if text is not None:
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
    (folder / "job.sh").write_text(script)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "host[0-1]",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        ["bash", "job.sh"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def number(file):
    """The process number in a file, once it is there."""
    return int(until(lambda: file.exists() and file.read_text().strip()))


def ended(pid):
    """Whether a process is gone; one that nobody has waited for yet is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def requeued(folder):
    log = folder / "scontrol.log"
    return log.exists() and log.read_text().split() == ["requeue", "7"]


def test_srun_script_stops_workers_and_requeues(tmp_path):
    job = started(BY_SRUN, tmp_path)
    launcher, worker = number(tmp_path / "launcher"), number(tmp_path / "worker")
    for process in (launcher, worker):  # every process of the step, the batch script not
        os.kill(process, signal.SIGUSR1)
    printed, _ = job.communicate(timeout=30)
    assert requeued(tmp_path) and (tmp_path / "status-7").read_text() == "75\n", printed


def test_batch_script_passes_signal_and_requeues(tmp_path):
    job = started(BY_THE_SCRIPT, tmp_path)
    launcher, worker = number(tmp_path / "launcher"), number(tmp_path / "worker")
    job.send_signal(signal.SIGUSR1)
    printed, _ = job.communicate(timeout=30)
    assert requeued(tmp_path) and (tmp_path / "status-7").read_text() == "75\n", printed
    assert ended(launcher) and ended(worker)


@pytest.mark.parametrize("script", [BY_SRUN, BY_THE_SCRIPT], ids=["srun", "batch"])
def test_finished_job_is_not_requeued(tmp_path, script):
    (tmp_path / "status-7").write_text("75\n")  # of the job before it was requeued
    (tmp_path / "done").touch()
    job = started(script, tmp_path)
    job.communicate(timeout=30)
    assert not requeued(tmp_path) and (tmp_path / "status-7").read_text() == "0\n"


@pytest.fixture
def launcher_gone(monkeypatch):
    """The watch of a worker, whose launcher ends. Gives (start it, its exits)."""
    exits = []
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(launcher.os, "_exit", exits.append)
    return lambda: threading.Thread(target=launcher._watch, args=(os.getppid() + 1,)), exits


def test_worker_exits_without_launcher(launcher_gone, monkeypatch):
    watch, exits = launcher_gone
    monkeypatch.setattr(stopping, "_requested", False)
    thread = watch()
    thread.start()
    thread.join(10)
    assert exits == [143]


def test_watch_waits_for_a_save(launcher_gone, monkeypatch):
    watch, exits = launcher_gone
    monkeypatch.setattr(stopping, "_requested", True)
    thread = watch()
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive() and not exits
    monkeypatch.setattr(launcher, "MAX_SAVE_SECONDS", 0)  # the save takes too long
    monkeypatch.setattr(stopping, "_requested", False)
    thread.join(10)
    assert exits == [143]


def test_watch_does_not_wait_for_ever(launcher_gone, monkeypatch):
    watch, exits = launcher_gone
    monkeypatch.setattr(stopping, "_requested", True)
    monkeypatch.setattr(launcher, "MAX_SAVE_SECONDS", 0.05)
    thread = watch()
    thread.start()
    thread.join(10)
    assert exits == [143]


def test_signals_arrive_during_computation(tmp_path):
    seen = []

    def ask():
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        seen.append((stopping.stop_requested(), stop.name))

    with StopSignal(RunFolder(tmp_path), lambda text: None) as stop:
        assert not stopping.stop_requested()
        other = threading.Thread(target=ask)
        other.start()
        while other.is_alive():  # no handler runs in these calls
            hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000)
        other.join()
    assert seen[0][0] and stop.name == "SIGUSR1"
    with StopSignal(RunFolder(tmp_path), lambda text: None):
        assert not stopping.stop_requested()  # a new run


def test_main_process_writes_its_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSION_ADAGN_STATUS", str(tmp_path / "status"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for rank, written in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            launcher.leave(75)
        assert left.value.code == 75 and (tmp_path / "status").exists() is written
    assert (tmp_path / "status").read_text() == "75\n"
    monkeypatch.setenv("DIFFUSION_ADAGN_STATUS", str(tmp_path / "no/folder"))
    with pytest.raises(SystemExit):
        launcher.leave(0)
    assert "could not be written" in capsys.readouterr().err


# ---------------------------------------------------------------------- by torchrun itself

# a worker whose checkpoint waits until the file `release` is there
TRAIN = """
import os, sys, time
from pathlib import Path
from diffusion_adagn.cli import main
from diffusion_adagn.training import checkpointer, trainer

save_checkpoint, any_process, steps = checkpointer.save_checkpoint, trainer.any_process, 0
rank = os.environ["RANK"]

def waiting(*args, **kwargs):
    Path("saving").touch()
    while not Path("release").exists():
        time.sleep(0.05)
    return save_checkpoint(*args, **kwargs)

def counted(*args):
    global steps
    steps += 1
    if steps == 2:
        Path(f"ready-{rank}.new").write_text(str(os.getpid()))
        Path(f"ready-{rank}.new").rename(f"ready-{rank}")
    return any_process(*args)

checkpointer.save_checkpoint, trainer.any_process = waiting, counted
settings = {"model.model_channels": 16, "model.channel_mult": 1, "model.num_res_blocks": 1, "model.norm_groups": 4,
    "model.attention_resolutions": 4, "model.num_head_channels": 16, "training.batch_size": 4, "training.max_steps": 1000000,
    "training.checkpoint_every": 1000000, "training.preview_every": 0, "training.diagnostics_every": 0}
sys.argv = ["train.py", "--output_dir", "run", "--device", "cpu", *(f"--{k}={v}" for k, v in settings.items())]
main.script("train")
"""
TORCHRUN = f'exec {sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 "$PWD/train.py"\n'


def saved(folder):
    return list((folder / "run/checkpoints").glob("step-*/state.json"))


def asked_by_all_signals(folder, job, signalled):
    """Ask, wait until it saves and longer than a worker lives without a launcher, then let it save. What was printed."""
    workers = [number(folder / f"ready-{rank}") for rank in (0, 1)]
    for process in signalled(workers):
        os.kill(process, signal.SIGUSR1)
    until((folder / "saving").exists)
    time.sleep(4 * launcher.POLL_SECONDS)
    assert not any(ended(worker) for worker in workers) and not saved(folder)
    (folder / "release").touch()
    printed, _ = job.communicate(timeout=120)
    until(lambda: all(ended(worker) for worker in workers))
    assert len(saved(folder)) == 1
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("script", [BY_SRUN, BY_THE_SCRIPT], ids=["srun", "batch"])
def test_torchrun_waits_for_a_long_save(tmp_path, script):
    (tmp_path / "train.py").write_text(TRAIN)
    agent = f"#!/bin/bash\necho $$ > launcher\n{TORCHRUN}"
    job = started(script, tmp_path, torchrun=agent)
    of_the_step = (lambda workers: [number(tmp_path / "launcher"), *workers]) if script == BY_SRUN else None
    printed = asked_by_all_signals(tmp_path, job, of_the_step or (lambda _: [job.pid]))
    assert "Stopped by SIGUSR1" in printed
    assert requeued(tmp_path) and (tmp_path / "status-7").read_text() == "75\n"


@pytest.mark.slow
def test_workers_save_although_torchrun_has_ended(tmp_path):
    """As under `srun torchrun` with --signal=USR1: torchrun does not ignore it."""
    (tmp_path / "train.py").write_text(TRAIN)
    script = f'export DIFFUSION_ADAGN_STATUS="$PWD/status-7"\n{TORCHRUN}'
    job = started(script, tmp_path)
    asked_by_all_signals(tmp_path, job, lambda workers: [job.pid, *workers])
    assert job.returncode == -signal.SIGUSR1
    assert (tmp_path / "status-7").read_text() == "75\n"
