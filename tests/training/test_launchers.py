"""Two processes, however they were started, are one run and give the images of one process."""

import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from tiny_run import TINY, losses, words

pytestmark = [pytest.mark.slow, pytest.mark.serial]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
NODES = range(2)


def launchers(name):
    """The command lines before the program's own, one a node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {
        "torchrun": [[*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m"]],
        "torchrun, two nodes": [
            [*TORCHRUN, "--nnodes", "2", "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port, "--nproc_per_node", "1", "-m"]
            for rank in NODES
        ],
        "torchrun, two nodes that find each other": [
            [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "-m"]
            for _ in NODES
        ],
        "accelerate": [[*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", port, "-m"]],
        "accelerate, two machines": [
            [*ACCELERATE, "--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
             "--main_process_port", port, "-m"]
            for rank in NODES
        ],
        "accelerate, a trap": [[*ACCELERATE, "--cpu", "--num_processes", "2", "-m"]],
    }[name]  # fmt: skip


def launched(name, *argv):
    """What `adagn ARGV` printed on all nodes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*command, "diffusion_adagn", *map(str, argv)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in launchers(name)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(p[-3000:] for p in printed)
    return "".join(printed)


def train(out):
    return ["train", "--output_dir", out, *words(TINY | {"training.max_steps": 6, "data.flip": "true"})]


def sample(model, out):
    settings = "--classes 1,7 --guidance 1,2 --count 3 --steps 3 --batch_size 2"
    return ["sample", model, "--out", out, *settings.split()]


def sweep(model, out):
    settings = "--against digits --extractor sklearn --guidance 1,2 --steps 3 --count 40 --batch_size 8"
    return ["sweep", model, "--out", out, *settings.split()]


def metrics(point):
    """{metric: value} of a sweep's point, NaN where it is not computed."""
    found = json.loads((point / "row.json").read_text())["metrics"]
    return {name: math.nan if metric["value"] is None else metric["value"] for name, metric in found.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes: run, samples, sweep."""
    folder = tmp_path_factory.mktemp("alone")
    for argv in (train(folder / "run"), sample(folder / "run", folder / "s"), sweep(folder / "run", folder / "w")):
        command = [sys.executable, "-m", "diffusion_adagn", *map(str, argv)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "torchrun",
        "torchrun, two nodes",
        "torchrun, two nodes that find each other",
        "accelerate",
        "accelerate, two machines",
    ],
)
def test_however_two_processes_are_started(alone, tmp_path, name):
    printed = launched(name, *train(tmp_path / "run"))
    assert printed.count("= 2 process(es)") == 1
    one, two = losses(alone / "run"), losses(tmp_path / "run")
    assert one.keys() == two.keys()
    assert one[1] == pytest.approx(two[1], abs=1e-6)
    assert list(one.values()) == pytest.approx(list(two.values()), abs=1e-4)

    assert "on 2 process(es)" in launched(name, *sample(alone / "run", tmp_path / "s"))
    assert json.loads((alone / "s/samples.json").read_text()) == json.loads((tmp_path / "s/samples.json").read_text())
    images = sorted(p.name for p in (alone / "s").iterdir())
    assert len(images) == 12 + 2 and images == sorted(p.name for p in (tmp_path / "s").iterdir())
    for image in images:
        assert (alone / "s" / image).read_bytes() == (tmp_path / "s" / image).read_bytes(), image

    assert "on 2 process(es)" in launched(name, *sweep(alone / "run", tmp_path / "w"))
    points = sorted(p.relative_to(alone) for p in alone.glob("w/points/*"))
    assert len(points) == 2
    for point in points:
        first, second = (metrics(folder / point) for folder in (alone, tmp_path))
        assert first["kid"] > 0 and second == pytest.approx(first, rel=1e-4, abs=1e-9, nan_ok=True)
        assert np.array_equal(*(np.load(folder / point / "shown.npy") for folder in (alone, tmp_path)))


def test_missing_process_is_reported(alone, tmp_path):
    """accelerate launch --cpu starts one and says nothing: the program does."""
    assert "= 1 process(es)" in launched("accelerate, a trap", *train(tmp_path / "run"))
    assert losses(alone / "run") == losses(tmp_path / "run")
    assert "on 1 process(es)" in launched("accelerate, a trap", *sample(alone / "run", tmp_path / "s"))
