"""A batch size is found before the networks are compiled and captured."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn.config import SpeedConfig
from diffusion_adagn.sampling import generate


@pytest.fixture
def order(monkeypatch):
    """What happens, in its order."""
    order = []
    monkeypatch.setattr(generate, "compile_blocks", lambda unet: order.append("compile"))
    monkeypatch.setattr(generate, "CUDAGraphDenoiser", lambda unet: order.append("capture"))
    monkeypatch.setattr(generate, "gather_object", lambda found: found)
    return order


def request(batch_size=None, compile=True, graph=True):
    speed = SpeedConfig("fp32", "contiguous", "eager", compile)
    return generate.SampleRequest(batch_size=batch_size, speed=speed, graph=graph)


def test_batch_search_precedes_compiling(order, monkeypatch):
    monkeypatch.setattr(generate, "batch_that_fits", lambda networks, most, precision: order.append(precision) or most)
    networks = [(SimpleNamespace(), 1), (SimpleNamespace(), 1)]
    assert generate._batch_then_wrap(networks, request(), 9).batch_size == 4  # graphs need as much again
    assert order == ["fp32", *["compile", "capture"] * 2]
    order.clear()
    assert generate._batch_then_wrap(networks, request(graph=False, compile=False), 9).batch_size == 9
    assert generate._batch_then_wrap(networks, request(graph=False), 1).batch_size == 1
    assert generate._batch_then_wrap(networks, request(batch_size=7), 9).batch_size == 7
    assert order == ["fp32", "fp32", "compile", "compile", *["compile", "capture"] * 2]


def test_batch_search_frees_memory(order, monkeypatch):
    class Network:
        """What a search asks of a network; memory for five images of two rows."""

        device = SimpleNamespace(type="cuda")
        config = SimpleNamespace(in_channels=1, sample_size=8, num_classes=3)
        dtype = torch.float32

        def modulation(self, t, label):
            return label

        def denoise(self, x, m):
            order.append(len(x))
            if len(x) > 10:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **how: zeros(*size, **how))
    monkeypatch.setattr(generate, "use_precision", lambda precision, device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("freed"))
    monkeypatch.setattr(generate, "estimate_cost", lambda config: SimpleNamespace(activation_bytes=1600))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))

    def tries(most, graph=True):
        order.clear()
        found = generate._batch_then_wrap([(Network(), 2)], request(graph=graph), most).batch_size
        return found, [rows for rows in order if isinstance(rows, int)]

    free = 2**40
    assert tries(8) == (2, [16, 8]) and order[-3:] == ["freed", "compile", "capture"]
    assert tries(7, graph=False) == (3, [14, 6])
    assert tries(40, graph=False) == (5, [88, 44, 20 + 2, 10])  # a tenth of room
    free = 4000  # twenty images by the estimate
    assert tries(4096, graph=False) == (5, [44, 22, 10])


def test_batch_search_changes_no_sample(order):
    unet = tiny_unet()
    before = unet.denoise
    assert generate._batch_then_wrap([(unet, 2)], request(compile=False, graph=False), 3).batch_size == 3
    assert unet.denoise == before and not order
