"""Where the training images lie on a CUDA GPU: chosen by its free memory, or by the setting; and in the estimate."""

import pytest
import torch

from diffusion_adagn.config import DataConfig, RunConfig, TrainingConfig, read_config
from diffusion_adagn.data import open_dataset
from diffusion_adagn.training import image_fetcher, setup

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return open_dataset(DataConfig(), "train", progress=False)


@pytest.fixture
def kinds(monkeypatch):
    for name in ("DeviceImageCache", "ThreadedImageFetcher"):
        monkeypatch.setattr(image_fetcher, name, lambda dataset, device, name=name: name)


def free(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (count, count))


def test_the_setting_decides_where_images_lie(digits, kinds, monkeypatch):
    for memory, auto in ((2**40, "DeviceImageCache"), (2**10, "ThreadedImageFetcher")):
        free(monkeypatch, memory)
        found = [image_fetcher.choose_image_fetcher(digits, CUDA, where) for where in ("auto", "device", "host")]
        assert found == [auto, "DeviceImageCache", "ThreadedImageFetcher"]
    assert type(image_fetcher.choose_image_fetcher(digits, CPU, "device")) is image_fetcher.ImageFetcher


def test_images_on_the_device_are_estimated(digits, monkeypatch):
    free(monkeypatch, 2**40)

    def head(where):
        config = RunConfig(training=TrainingConfig(max_steps=1, images_on=where))
        line = setup.describe(config, digits, 1, CUDA, cost())["memory"]
        return float(line.split()[1]), line

    def cost():
        return setup.Cost(parameters=0, flops=0, activation_bytes=0)

    monkeypatch.setattr(
        setup, "resolve_speed", lambda asked, device, flops: read_config(None, {"speed.precision": "fp32"}).speed
    )
    monkeypatch.setattr(setup, "describe_speed", lambda *_: "")
    monkeypatch.setattr(type(digits), "__len__", lambda self: 2**24)
    gib = 2**24 * 64 / 2**30
    assert head("host")[0] == 0 and "images" not in head("host")[1]
    assert head("auto")[0] == head("device")[0] == pytest.approx(gib)
    assert "training.images_on host" in head("auto")[1]
