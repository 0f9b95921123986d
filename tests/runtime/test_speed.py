"""What is chosen for a machine, and that no choice changes what is computed."""

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn.config import SpeedConfig, read_config
from diffusion_adagn.errors import InputError
from diffusion_adagn.labels import LabelSpace
from diffusion_adagn.runs.checkpoint import load_checkpoint, save_checkpoint
from diffusion_adagn.runtime import speed
from diffusion_adagn.sampling.class_mix import ClassMix, modulation_table
from diffusion_adagn.training.ema import EMA

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
LARGE, SMALL = 3_000_000_000, 10_000_000


@pytest.mark.parametrize(
    "device, bf16, flops, precision, memory_format",
    [
        (CPU, True, LARGE, "bf16", "channels_last"),
        (CPU, True, SMALL, "fp32", "channels_last"),
        (CPU, False, LARGE, "fp32", "channels_last"),
        (CUDA, True, SMALL, "bf16", "channels_last"),
        (CUDA, False, LARGE, "fp16", "channels_last"),
        (MPS, False, LARGE, "fp32", "contiguous"),
    ],
)
def test_auto_is_chosen_by_the_machine(monkeypatch, device, bf16, flops, precision, memory_format):
    monkeypatch.setattr(speed, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(
        speed, "unsupported_reason", lambda device, *_, note: "no kernel." if device.type == "mps" else ""
    )
    asked = SpeedConfig()
    chosen = speed.resolve_speed(asked, device, flops)
    operator = "eager" if device.type == "mps" else "fused"
    assert (chosen.precision, chosen.memory_format, chosen.operator) == (precision, memory_format, operator)
    output = speed.describe_speed(chosen, asked)
    assert all(word in output for word in (precision, memory_format, operator, "chosen for this machine"))
    forced = SpeedConfig("fp32", "contiguous", "eager", True)
    assert speed.resolve_speed(forced, device, flops) == forced
    assert "chosen" not in speed.describe_speed(forced, forced) and "compiled" in speed.describe_speed(forced, forced)


def test_impossible_speed_settings_are_rejected(monkeypatch):
    with pytest.raises(InputError, match=r"speed.precision fp16 needs a CUDA GPU"):
        speed.resolve_speed(SpeedConfig(precision="fp16"), CPU, LARGE)
    monkeypatch.setattr(speed, "unsupported_reason", lambda *_, note: "there is no C++ compiler.")
    with pytest.raises(InputError, match=r"no C\+\+ compiler"):
        speed.resolve_speed(SpeedConfig(operator="fused"), CPU, LARGE)
    assert speed.resolve_speed(SpeedConfig(), CPU, LARGE).operator == "eager"
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(InputError, match=r"CXX names /nowhere/c\+\+.*Omit speed.compile"):
        speed.resolve_speed(SpeedConfig(compile=True), CPU, LARGE)


def test_one_word_in_a_config(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("speed: auto\n")
    assert read_config(file).speed == SpeedConfig()
    file.write_text("training: {precision: bf16}\n")  # where it stood before
    assert read_config(file).speed.precision == "bf16"
    file.write_text("speed: fast\n")
    with pytest.raises(InputError, match=r"'speed' is a section.*or auto"):
        read_config(file)


def test_layouts_and_operators_compute_the_same():
    torch.manual_seed(0)
    unet = tiny_unet().eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 3])
    outs = {}
    for memory_format in ("auto", "contiguous", "channels_last"):
        for operator in ("eager", "auto"):
            unet.set_memory_format(memory_format)
            unet.set_operator(operator)
            outs[memory_format, operator] = unet(x, t, y).sample
            assert outs[memory_format, operator].is_contiguous()
    for out in outs.values():
        torch.testing.assert_close(out, outs["contiguous", "eager"], atol=1e-5, rtol=1e-4)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(InputError, match="memory format is one of"):
        unet.set_memory_format("nhwc")


def test_checkpoint_loads_in_other_formats(tmp_path):
    def made(memory_format):
        torch.manual_seed(0)
        unet = tiny_unet()
        unet.set_memory_format(memory_format)
        return unet, EMA(unet, 0.9), torch.optim.AdamW(unet.parameters(), fused=True)

    def step(unet, ema, optimizer, number):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(number))
        unet(x, torch.tensor([3, 700]), torch.tensor([0, 3])).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(unet, number)

    whole = made("channels_last")
    step(*whole, 1)
    path = save_checkpoint(tmp_path, {"step": 1}, whole[0], whole[1].model, whole[2])
    again = made("channels_last")
    load_checkpoint(path, again[0], again[1].model, again[2])
    for p, q in zip(whole[0].parameters(), again[0].parameters()):
        for part, value in whole[2].state[p].items():
            other = again[2].state[q][part]
            assert torch.equal(value, other) and value.stride() == other.stride()
    other = made("contiguous")
    load_checkpoint(path, other[0], other[1].model, other[2])
    for one in (whole, again, other):
        step(*one, 2)
    for p, q, r in zip(*(one[0].parameters() for one in (whole, again, other))):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["adagn", "cross_attention", "none"])
def test_modulation_table_equals_single_steps(kind):
    torch.manual_seed(0)
    unet, labels = tiny_unet(conditioning=kind), LabelSpace(("a", "b", "c"))
    plans = [ClassMix.single(i, labels) for i in (2, 0, 3, 2)]
    timesteps = torch.tensor([900, 500, 100, 20, 0])
    made = []
    real = unet.project_condition
    unet.project_condition = lambda t, y, **k: made.append(len(t)) or real(t, y, **k)
    row = sum(p.numel() * 4 for p in real(torch.zeros(3), torch.arange(3)) if p is not None)  # a step, three classes
    for most, products in ((2**26, [15]), (2 * row, [6, 6, 3]), (1, [3] * 5)):
        made.clear()
        tell = modulation_table(unet, plans, timesteps, most)
        with torch.no_grad():
            for step, t in enumerate(timesteps):
                output, wanted = tell(step), unet.split_modulation(*real(t.expand(4), torch.tensor([2, 0, 3, 2])))
                for site in wanted:
                    for a, b in zip(output[site], wanted[site]):
                        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert made == products


def test_compiled_blocks_answer_as_before(monkeypatch):
    monkeypatch.setattr(speed, "COMPILER", "eager")
    torch.manual_seed(0)
    unet = tiny_unet()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 3])
    plain = unet(x, t, y).sample
    names = list(unet.state_dict())
    speed.compile_blocks(unet)
    assert torch.equal(unet(x, t, y).sample, plain) and list(unet.state_dict()) == names


def test_the_peak_is_a_rate():
    assert 1e8 < speed.measure_peak_flops("cpu", seconds=0.02) < 1e14


def test_processes_share_one_precision(monkeypatch):
    monkeypatch.setattr(
        speed, "broadcast_object_list", lambda mine: ["bf16"]
    )  # as a main process with another card has it
    asked = speed.SpeedConfig(operator="eager")
    assert speed.resolve_speed(asked, torch.device("cpu"), 1).precision == "fp32"
    assert speed.resolve_speed_together(asked, torch.device("cpu"), 1).precision == "bf16"


def test_apple_gpu_timing_synchronizes(monkeypatch):
    """They are queued; and they are smaller there than a CUDA card's."""
    waits, sides, randn = [], [], torch.randn

    def small(*shape, device):
        sides.append(shape[-1])
        return randn(2, 4, 4)

    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch, "randn", small)
    assert speed.measure_peak_flops("mps", seconds=0) > 0
    assert sides == [1024, 2048] and len(waits) == 8


def test_graphs_are_captured_per_shape(monkeypatch):
    """The bookkeeping, with a graph that is run again where CUDA would replay it; a real one needs a GPU."""
    captured, pools, streams, guarded = [], [], set(), []

    class Graph:
        def replay(self):
            self.out.copy_(self.again())

        def pool(self):
            return (0, 1)

    class Capture:
        def __init__(self, graph, pool, stream):
            captured.append(graph)
            pools.append(pool)
            streams.add(stream)

        __enter__ = __exit__ = lambda *_: None

    class Stream:
        wait_stream = lambda *_: None  # noqa: E731

    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    torch.manual_seed(0)
    unet = tiny_unet().eval().requires_grad_(False)
    plain, seen = unet.denoise, []

    def denoise(x, m):
        out = plain(x, m)
        if captured and not hasattr(captured[-1], "out"):  # the call that is captured
            captured[-1].out, captured[-1].again = out, lambda: plain(x, m)
        seen.append(len(x))
        return out

    unet.denoise = denoise
    graphed = speed.CUDAGraphDenoiser(unet)
    for rows in (2, 3, 2):
        for t in (900.0, 10.0):
            x, m = torch.randn(rows, 1, 8, 8), unet.modulation(t, torch.arange(rows))
            torch.testing.assert_close(graphed(x, m), plain(x, m))
            assert guarded[0] is x and {id(some) for some in guarded} == {id(x)}
            guarded.clear()
    assert len(captured) == 2 and seen == [2] * 4 + [3] * 4  # three to warm up and one to capture, a shape
    assert pools == [None, (0, 1)] and len(streams) == 1  # one memory and one stream for all of them
