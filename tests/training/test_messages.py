"""What training prints when it is stopped, when memory is exhausted, and into a file."""

import hashlib
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_unet
from tiny_run import run
from tqdm import tqdm

from diffusion_adagn import LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig, SpeedConfig
from diffusion_adagn.diffusion.process import ddpm, flow
from diffusion_adagn.errors import InputError
from diffusion_adagn.runs.layout import RunFolder
from diffusion_adagn.training import logger, transfer
from diffusion_adagn.training import train as train_module
from diffusion_adagn.training.stop_signal import StopSignal


@pytest.mark.serial
def test_signals_are_answered_within_a_step(tmp_path):
    for numbers, last in (((signal.SIGTERM,), "SIGTERM"), ((signal.SIGINT, signal.SIGINT), None)):
        said, ready = [], threading.Event()

        def send(numbers=numbers, said=said, ready=ready):
            ready.wait()
            for number in numbers:
                time.sleep(0.05)
                os.kill(os.getpid(), number)
            time.sleep(0.05)
            said.append("the call ends")

        sender = threading.Thread(target=send)
        sender.start()
        before = signal.getsignal(signal.SIGINT)
        (tmp_path / "checkpoints/step-00000200").mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoints/step-00000200/state.json").touch()
        try:
            with StopSignal(RunFolder(tmp_path), said.append) as stop:
                ready.set()
                hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)  # no handler runs in this call
                sender.join()
            left = stop.name
        except KeyboardInterrupt:
            left = None
        sender.join()
        assert left == last and signal.getsignal(signal.SIGINT) is before
        assert said.index("the call ends") == len(numbers)
        assert "stopping after this step and saving" in said[0]
        assert ("Ctrl-C again exits without saving" in said[0]) == (last is None)
        if last is None:
            assert "exiting without saving" in said[1] and "step-00000200" in said[1] and "--resume" in said[1]


def test_file_gets_line_per_log_step(tmp_path, capsys):
    assert run(tmp_path / "run", training__max_steps=8, training__log_every=4, training__diagnostics_every=0) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 1/8", "step 4/8", "step 8/8"]
    assert all(word in lines[1] for word in ("loss ", "images/s", " left")) and "step/s" not in err


def test_bar_shows_loss_between_log_steps(tmp_path, monkeypatch):
    shown = []

    class Bar(tqdm):
        def set_postfix_str(self, text, refresh=True):
            shown.append(text.split(",")[0])

    monkeypatch.setattr(logger, "tqdm", Bar)
    run(tmp_path / "run", training__log_every=100, training__diagnostics_every=0)
    assert len(shown) == len(set(shown)) == 6


CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 16777216 bytes."


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (RuntimeError(CPU), "16 MiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "20.00 GiB"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 256.00 MiB on"), "256.00 MiB"),
        (MemoryError(), ""),
    ],
)  # fmt: skip
def test_exhausted_memory_lists_remedies(error, size, monkeypatch, capsys):
    def fail(*_, **__):
        bar = tqdm(total=2, desc="training")
        bar.update()
        raise error

    monkeypatch.setattr(train_module, "train", fail)
    assert main(["train", "digits"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("adagn: out of memory") and size in line
    for remedy in ("gradient_accumulation", "gradient_checkpointing", "training.batch_size", "model.model_channels"):
        assert remedy in line
    monkeypatch.setattr("diffusion_adagn.cli.sample.run", fail)
    assert main(["sample", "x"]) == 1
    assert "Lower --batch_size" in capsys.readouterr().err


def test_other_errors_keep_their_text(monkeypatch, capsys):
    monkeypatch.setattr(train_module, "train", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    assert main(["train", "digits"]) == 1
    assert "RuntimeError: shapes differ" in capsys.readouterr().err


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run folder .*file/run cannot be made .*--output_dir"):
        run(tmp_path / "file" / "run")


def test_learning_rate_of_zero_is_rejected(tmp_path):
    with pytest.raises(InputError, match=r"training.lr: must be above 0, got 0"):
        run(tmp_path / "run", training__lr=0)
    assert not (tmp_path / "run").exists()


def test_devices_are_accepted_in_capitals(tmp_path, capsys):
    assert run(tmp_path / "run", training__max_steps=1, speed__device="CPU") == 0
    for option in ("--device", "--speed.device"):
        assert main(["train", "digits", option, "gpu"]) == 2
        assert "speed.device: there is no device 'gpu'; expected auto, cpu, cuda" in capsys.readouterr().err


def test_share_above_peak_is_no_percentage(monkeypatch):
    monkeypatch.setattr(logger, "measure_peak_flops", lambda *_, **__: 3e9)
    effort = logger.format_throughput(3 * 10**9, SpeedConfig(precision="fp32"), torch.device("cpu"), 1)
    assert effort(0.5).endswith("(50 % of peak)") and effort(2).endswith("(at peak)")


FLOW = DiffusionConfig(process="flow")


def test_transfer_warns_of_another_process(monkeypatch):
    old = SimpleNamespace(unet=tiny_unet(num_classes=2), labels=LabelSpace(("1", "7")), one_pass=False, process=flow())
    monkeypatch.setattr(transfer, "open_pipeline", lambda source: (old, "a run"))
    for diffusion in (FLOW, DiffusionConfig(process="edm"), DiffusionConfig()):
        sentence = transfer.transfer("a", tiny_unet(num_classes=2), LabelSpace(("1", "7")), diffusion)
        expected = f"trained with diffusion.process flow, and here it is diffusion.process {diffusion.process}"
        assert (expected in sentence) == ("Warning" in sentence) == (diffusion is not FLOW)
    old.process = ddpm(torch.linspace(0.99, 0.01, 10), "eps")
    for prediction in ("eps", "v"):
        diffusion = DiffusionConfig(prediction=prediction)
        sentence = transfer.transfer("a", tiny_unet(num_classes=2), LabelSpace(("1", "7")), diffusion)
        assert ("diffusion.prediction eps, and here it is diffusion.prediction v" in sentence) == (prediction == "v")


def test_transfer_says_which_rows_are_new(monkeypatch):
    old = SimpleNamespace(unet=tiny_unet(num_classes=2), labels=LabelSpace(("1", "7")), one_pass=False, process=flow())
    monkeypatch.setattr(transfer, "open_pipeline", lambda source: (old, "a run"))
    for names, said in ((("7", "1"), "3 of 3 rows"), (("7", "3"), "2 of 3 rows")):
        sentence = transfer.transfer("a", tiny_unet(num_classes=2), LabelSpace(names), FLOW)
        assert said in sentence and ("the others are new" in sentence) == ("3" in names)


def test_transfer_warns_if_most_weights_are_new(monkeypatch):
    old = SimpleNamespace(unet=tiny_unet(num_classes=2), labels=LabelSpace(("1", "7")), one_pass=False, process=flow())
    monkeypatch.setattr(transfer, "open_pipeline", lambda source: (old, "a run"))
    width = old.unet.config.model_channels
    assert "Warning" not in transfer.transfer("a", tiny_unet(num_classes=3), LabelSpace(("1", "7", "9")), FLOW)
    sentence = transfer.transfer("a", tiny_unet(num_classes=2, model_channels=2 * width), LabelSpace(("1", "7")), FLOW)
    assert f"a has model.model_channels {width} (here {2 * width})." in sentence.partition("Warning: ")[2]
    many = tuple(map(str, range(4000)))
    old.unet, old.labels = tiny_unet(num_classes=4000), LabelSpace(many)
    assert "Warning" not in transfer.transfer("a", tiny_unet(num_classes=4000), LabelSpace(many), FLOW)
    with pytest.raises(InputError, match=r"no layer.*model.patch_size 1 \(here 2\)"):
        patches = tiny_unet(num_classes=2, patch_size=2, model_channels=2 * width)
        transfer.transfer("a", patches, LabelSpace(("1", "7")), FLOW)


def test_transfer_names_the_command_that_made_a_shipped_model():
    sentence = transfer.transfer(
        "digits", tiny_unet(num_classes=10), LabelSpace(tuple("0123456789")), DiffusionConfig()
    )
    assert "model.model_channels 32 (here 16)" in sentence and "It was made by `adagn train digits" in sentence


def test_training_runs_in_any_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path / "run", training__max_steps=2)))
    thread.start()
    thread.join()
    assert results == [0]


def test_head_counts_images_per_pass(tmp_path, capsys):
    assert run(tmp_path / "run", training__max_steps=1, training__batch_size=8, training__gradient_accumulation=2) == 0
    assert "batch     8 = 1 process(es) x 2 pass(es) x 4 images, on cpu" in capsys.readouterr().out
