"""One function chooses the device; what is asked for and is not there is rejected; a GPU that should be there is missed."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusion_adagn.cli.main import main
from diffusion_adagn.config import SpeedConfig, read_config
from diffusion_adagn.errors import InputError
from diffusion_adagn.runtime import distributed
from diffusion_adagn.runtime.distributed import choose_device, no_gpu_note, process_state

TINY = {
    "model.model_channels": 16, "model.channel_mult": "1", "model.num_res_blocks": 1, "model.attention_resolutions": 4,
    "model.num_head_channels": 16, "model.norm_groups": 4, "training.batch_size": 8, "training.preview_every": 0,
    "training.diagnostics_every": 0,
}  # fmt: skip
COMMANDS = {
    "train": ["train", "--output_dir", "OUT", "--training.max_steps", "1"],
    "sample": ["sample", "RUN", "--out", "OUT"],
    "evaluate": ["evaluate", "RUN", "--out", "OUT"],
    "sweep": ["sweep", "RUN", "--out", "OUT"],
    "trace": ["trace", "RUN", "--out", "OUT"],
    "ablate": ["ablate", "CONFIG", "--output_dir", "OUT", "--training.max_steps", "1"],
}


@pytest.fixture
def gpus(monkeypatch):
    """gpus(cuda=2, mps=False, launched=None, driver=False): a machine as torch and the environment show it."""

    def machine(cuda=0, mps=False, launched=None, driver=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(distributed, "_has_nvidia_driver", lambda: driver)
        for name in ("ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_CPU", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        if launched is not None:
            monkeypatch.setenv("WORLD_SIZE", str(launched))
            monkeypatch.setenv("LOCAL_RANK", "0")

    return machine


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert (
        main(["train", "--output_dir", str(out), "--training.max_steps=2", *(f"--{k}={v}" for k, v in TINY.items())])
        == 0
    )
    return out


def test_auto_device_prefers_gpu(gpus, monkeypatch):
    for machine, device in (
        ({"cuda": 2, "mps": True}, "cuda"),
        ({"mps": True}, "mps"),
        ({}, "cpu"),
        ({"cuda": 8, "launched": 8}, "cuda"),
        ({"mps": True, "launched": 2}, "cpu"),  # they cannot share it
    ):
        gpus(**machine)
        assert choose_device() == torch.device(device), machine
    gpus(cuda=1)
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # accelerate launch --cpu
    assert choose_device().type == "cpu" and choose_device("cuda").type == "cuda"


@pytest.mark.parametrize(
    "machine, asked, said",
    [
        ({}, "cuda", r"no CUDA GPU.*Available here: auto, cpu\."),
        ({}, "mps", r"no Apple GPU.*Available here: auto, cpu\."),
        ({"cuda": 2}, "cuda:2", r"no GPU cuda:2.*auto, cpu, cuda, cuda:0, cuda:1\."),
        ({"cuda": 2}, "mps", r"auto, cpu, cuda, cuda:0, cuda:1\."),
        ({"cuda": 2, "launched": 2}, "cuda:1", r"for one process.*Type --device cuda.*CUDA_VISIBLE_DEVICES"),
        ({"mps": True, "launched": 2}, "mps", r"cannot share.*--device cpu"),
        ({}, "gpu", r"no device 'gpu': expected auto, cpu, cuda, cuda:1 or mps"),
        ({}, "cuda:-1", r"no device 'cuda:-1'"),
    ],
)
def test_unavailable_device_is_rejected(gpus, machine, asked, said):
    gpus(**machine)
    with pytest.raises(InputError, match=said):
        choose_device(asked)


def test_numbered_gpu_becomes_the_current_one(gpus, monkeypatch):
    gpus(cuda=2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert process_state("cuda:1").device == torch.device("cuda:1") == current[0]
        assert process_state("cpu").device == torch.device("cpu")  # another device later
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_computing_command_takes_device(command, gpus, trained, tmp_path, capsys):
    gpus()
    words = {"RUN": str(trained), "OUT": str(tmp_path / "out"), "CONFIG": str(trained / "config.yaml")}
    argv = [words.get(word, word) for word in COMMANDS[command]]
    assert main([*argv, "--device", "cuda"]) == 1
    assert "no CUDA GPU for --device cuda" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resumed_run_may_change_device(trained, tmp_path):
    trained = shutil.copytree(trained, tmp_path / "run")
    assert read_config(trained / "config.yaml").speed.device == "auto"
    resume = ["train", "--config", str(trained / "config.yaml"), "--output_dir", str(trained), "--resume", "auto"]
    assert main([*resume, "--device", "cpu", "--training.max_steps", "3", "--debug"]) == 0
    assert read_config(trained / "config.yaml").speed.device == "cpu"
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 3


def test_yaml_names_the_device(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("speed: {device: 'cuda:1'}\n")
    assert read_config(file).speed == SpeedConfig(device="cuda:1")
    file.write_text("speed: {device: tpu}\n")
    with pytest.raises(InputError, match=r"speed.device.*'tpu'.*expected auto, cpu, cuda, cuda:1 or mps"):
        read_config(file)


def test_missing_gpu_names_a_reason(gpus, monkeypatch):
    gpus()
    assert no_gpu_note() == ""  # a machine without a GPU
    gpus(cuda=1, launched=2, driver=True)
    assert no_gpu_note() == ""
    gpus(launched=2)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "No GPU found" in no_gpu_note() and "has no CUDA" in no_gpu_note() and "--device cpu" in no_gpu_note()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no NVIDIA driver" in no_gpu_note()
    gpus(driver=True)
    assert "No GPU found" in no_gpu_note() and "driver may be too old" in no_gpu_note()


def test_missing_gpu_is_printed_once(gpus, capsys):
    gpus(driver=True)
    distributed._print_once.cache_clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    process_state("cpu")
    assert "No GPU" not in capsys.readouterr().err
    process_state()
    process_state()
    assert capsys.readouterr().err.count("No GPU found") == 1
