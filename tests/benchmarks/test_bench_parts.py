"""The benchmarks' arithmetic against numbers computed by hand, and what they reject."""

import textwrap

import pytest
import torch
from torch import nn

from benchmarks import grow, limits, machine, memory, networks, op, ours, peers, sampling, tables
from benchmarks.sizes import SIZES, parse_choices
from benchmarks.timing import Clock, Deadline, Sample, fastest, interleave, paired, summary
from diffusion_adagn.errors import UsageError
from diffusion_adagn.models.cost import estimate_cost

CPU = torch.device("cpu")
XS = networks.Case("infer", SIZES["XS"], "fp32", 2, CPU)


def samples(seconds, shares=None):
    return [Sample(s, c) for s, c in zip(seconds, shares or [1.0] * len(seconds))]


# ---------------------------------------------------------------------- arithmetic


def test_ratio_is_the_median_of_rounds():
    """The ratio of the two sides' medians would be 20 / 2 = 10."""
    found = paired(samples([1, 2, 4]), samples([30, 20, 8]))
    assert (found["median"], found["min"], found["max"]) == (10, 2, 30)
    found = paired(samples([1, 2, 4]), samples([1, 20, 100]))
    assert found["median"] == 10 and found["max"] == 25
    assert (found["rounds"], found["used"], found["clean"]) == (3, 3, 3)


def test_noisy_rounds_are_used_if_few_are_clean():
    ours_, theirs = samples([1, 1, 1, 1]), samples([2, 2, 2, 90], [1, 1, 1, 0.5])
    assert paired(ours_, theirs) == {"median": 2, "min": 2, "max": 2, "rounds": 4, "used": 3, "clean": 3}
    theirs = samples([2, 2, 4, 90], [1, 1, 0.9, 0.5])
    found = paired(ours_, theirs)
    assert (found["median"], found["used"], found["clean"]) == (3, 4, 2)
    assert paired(samples([1.0], [None]), samples([2.0], [None]))["clean"] is None


def test_unpaired_samples_are_rejected():
    with pytest.raises(ValueError, match="rounds"):
        paired(samples([1]), samples([1, 2]))
    with pytest.raises(ValueError, match="rounds"):
        paired([], [])


def test_summary_counts_clean_samples():
    found = summary(samples([3, 1, 2], [1, 0.97, 0.9]))
    assert (found["median_s"], found["min_s"], found["max_s"], found["clean"]) == (2, 1, 3, 2)


def test_fastest_is_by_median_of_measured_rows():
    rows = [{"name": "a", "median_s": 2}, {"name": "b"}, {"name": "c", "median_s": 1}]
    assert fastest(rows)["name"] == "c"
    assert fastest([{"name": "b"}]) is None


def test_best_is_compared_with_the_peers_best():
    def row(name, side, operator, seconds, compiled=False):
        return {"name": name, "side": side, "operator": operator, "compiled": compiled, "median_s": seconds}

    rows = [
        row("fused", "ours", "fused", 1), row("eager", "ours", "eager", 3),
        row("slow", "diffusers", None, 9), row("fast", "diffusers", None, 2), row("rejected", "diffusers", None, None),
    ]  # fmt: skip
    taken = {r["name"]: samples([r["median_s"]] * 3) for r in rows if r["median_s"]}
    found = networks.ratios(rows, taken)
    assert [(r["ours"], r["peer"], r["median"], r["best"]) for r in found] == [
        ("fused", "fast", 2, True),
        ("eager", "fast", 2 / 3, False),
    ]
    assert networks.ratios([r for r in rows if r["side"] == "ours"], taken) == []


def test_order_alternates_between_rounds():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = interleave(calls, Clock("cpu", threads=2), rounds=3, sample_seconds=0, expected=dict.fromkeys("abc", 1.0))
    assert "".join(order) == "abccbaabc"
    assert [len(s) for s in found.values()] == [3, 3, 3]


def test_deadline_allows_one_round():
    assert Deadline(0).passed and not Deadline(None).passed and not Deadline(1).passed
    found = interleave({"a": lambda: None}, Clock("cpu", 2), rounds=5, sample_seconds=0, deadline=Deadline(0))
    assert len(found["a"]) == 1


@pytest.mark.parametrize("power", [0.0, 1.0, 2.3])
def test_exponent_matches_the_data(power):
    values = [1, 3, 10, 200]
    assert grow.exponent(values, [0.7 * v**power for v in values]) == pytest.approx(power, abs=1e-12)
    assert grow.exponent([5], [1.0]) is None


def test_growth_changes_only_its_axis():
    axes = grow.axes(SIZES["M"], 16, "cpu")
    assert [v for v, *_ in axes["classes"]] == [1, 10, 100, 1_000, 10_000, 100_000]
    assert [(v, s.attention) for v, s, _ in axes["side"]] == [(16, (8, 4)), (32, (16, 8)), (64, (32, 16))]
    assert [v for v, *_ in axes["channels"]] == [64, 128, 256]
    assert [v for v, *_ in axes["batch"]] == [1, 2, 4, 8, 16, 32]


# ---------------------------------------------------------------------- equal networks on both sides


@pytest.mark.parametrize(
    ("size", "resample", "parameters", "flops"),
    [("S", "residual", 7_663_747, 3.59e9), ("M", "residual", 57_096_835, 18.52e9), ("S", "conv", 6_952_003, 3.18e9)],
)
def test_sizes_match_the_published_ones(size, resample, parameters, flops):
    cost = estimate_cost(SIZES[size].network(resample))
    assert cost.parameters == parameters and cost.flops == pytest.approx(flops, rel=0.01)


def test_diffusers_twin_has_equal_outputs():
    unet = ours.network(**XS.size.network())
    assert all(p.any() for p in unet.parameters())
    nets = networks.Networks(XS)
    expected = networks._reference(XS, nets)
    work = networks.Workload(XS, networks.Variant("ours", "nhwc", "eager"), nets.get("ours"))
    assert networks.check_outputs(work.check(), expected, "fp32")[0] < 1e-5
    with torch.no_grad():
        work.net.get_parameter("down.0.stages.0.block.conv2.weight").mul_(1.5)
    with pytest.raises(networks.OutputsDiffer, match="outputs differ"):
        networks.check_outputs(work.check(), expected, "fp32")


def test_constant_output_cannot_be_compared():
    zero = torch.zeros(2, 3)
    with pytest.raises(networks.OutputsDiffer, match="constant"):
        networks.check_outputs((zero, None), (zero, None), "fp32")
    nan = torch.full((2, 3), torch.nan)
    good = torch.randn(2, 3)
    with pytest.raises(networks.OutputsDiffer, match="outputs differ"):
        networks.check_outputs((nan, None), (good, None), "fp32")
    with pytest.raises(networks.OutputsDiffer, match="gradients differ"):
        networks.check_outputs((good, -good), (good, good), "fp32")


def test_different_network_is_not_timed(monkeypatch):
    """A peer with other weights is rejected before it is timed."""
    twin = peers.diffusers_twin

    def other(unet):
        net = twin(unet)
        reference = not made
        made.append(net)
        if not reference:
            nn.init.normal_(net.conv_out.weight)
        return net

    made = []
    monkeypatch.setattr(networks, "MEMORY_FORMATS", {"nchw": torch.contiguous_format})
    monkeypatch.setattr(peers, "diffusers_twin", other)
    monkeypatch.setattr(
        networks.Networks,
        "get",
        lambda self, side: other(self.networks["ours"]) if side == "diffusers" else self.networks[side],
    )
    found = networks.measure(XS, ["diffusers"], Clock("cpu"), 1, 0)
    assert found["ratios"] == []
    rejected = [row for row in found["rows"] if row["side"] == "diffusers"]
    assert len(rejected) == 1 and all(
        "outputs differ" in row["not_measured"] and "median_s" not in row for row in rejected
    )
    assert all(row["median_s"] > 0 for row in found["rows"] if row["side"] == "ours")


def test_twin_of_another_size_is_rejected(monkeypatch):
    unet = ours.network(**XS.size.network())
    bigger = ours.network(**XS.size.network(num_res_blocks=2))
    export = peers.to_unet2d
    monkeypatch.setattr(peers, "to_unet2d", lambda _: export(bigger))
    with pytest.raises(ValueError, match="not the same network"):
        peers.diffusers_twin(unet)


def test_different_images_are_rejected():
    x0 = torch.rand(2, 3, 4, 4) - 0.5
    assert sampling._check_images(x0 / 2 + 0.5, x0, "fp32") < 1e-6
    with pytest.raises(networks.OutputsDiffer, match="images differ"):
        sampling._check_images(x0 / 2 + 0.6, x0, "fp32")


def test_missing_peer_names_its_install_command(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(peers.PeerMissing, match="pip install --no-deps denoising-diffusion-pytorch"):
        peers.lucidrains(SIZES["XS"])


def test_peer_loads_without_its_package_imports(monkeypatch, tmp_path):
    """Its __init__ cannot be imported without torchvision; the file with its network can."""
    package = tmp_path / "denoising_diffusion_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("import a_torchvision_that_is_not_there")
    code = """
        import torch
        class Unet(torch.nn.Module):
            def __init__(self, **config):
                super().__init__()
                self.config = config
            def forward(self, x, t, y, cond_drop_prob):
                return x + cond_drop_prob
    """
    (package / "classifier_free_guidance.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    net = peers.lucidrains(SIZES["S"])
    assert net.unet.config == {"dim": 64, "num_classes": 10, "dim_mults": (1, 2, 2), "channels": 3}
    assert net(torch.ones(1), None, None)[0] == 1
    (package / "classifier_free_guidance.py").write_text("import something_that_is_not_there")
    with pytest.raises(peers.PeerMissing, match="cannot be used"):
        peers.lucidrains(SIZES["S"])


def test_missing_fused_operator_has_a_reason(monkeypatch):
    monkeypatch.setattr(ours, "unsupported_reason", lambda device: "there is no C++ compiler")
    assert ours.operators(CPU) == (["eager"], "there is no C++ compiler")


def test_wrong_operator_is_rejected(monkeypatch):
    monkeypatch.setattr(op, "adagn_silu", lambda *args: 1.1 * op.formula(*args))
    found = op.measure(SIZES["XS"], "fp32", 2, Clock("cpu"), 1, 0)
    assert {row["implementation"] for row in found["rows"]} == {"copy", "formula"} and found["ratios"] == []
    assert sum("fused" in text and "differs" in text for text in found["not_measured"]) == 2


# ---------------------------------------------------------------------- limits, memory, text


def test_counted_layers_have_all_flops():
    """Their FLOPs add up to those of the network."""
    total = 0
    for (operation, first, second, settings), count in limits.count_layers(XS).items():
        if operation == "conv2d":
            side = first[2] // settings[0][0]
            total += count * 2 * first[0] * side * side * second[0] * second[1] * second[2] * second[3]
        elif operation == "linear":
            total += count * 2 * torch.Size(first[:-1]).numel() * second[0] * second[1]
        else:
            b, heads, n, d = first
            total += count * 2 * 2 * b * heads * n * second[2] * d
    assert total == 2 * networks.Networks(XS).flops("ours")  # two images


@pytest.mark.serial
@pytest.mark.slow
def test_memory_is_of_a_new_process():
    ballast = torch.ones(2**28 // 4)  # 256 MiB in this process must not count there
    case = networks.Case("train", SIZES["XS"], "fp32", 64, CPU)
    found = memory.peak_of(case, networks.Variant("ours", "nhwc", "eager"))
    assert found["idle_memory_bytes"] < found["peak_memory_bytes"] < found["idle_memory_bytes"] + ballast.nbytes


def test_threads_are_restored():
    before = torch.get_num_threads(), machine._allowed()
    with machine.threads(1):
        assert torch.get_num_threads() == 1 and len(machine._allowed()) == 1
    assert (torch.get_num_threads(), machine._allowed()) == before


def test_unknown_names_list_the_choices():
    assert parse_choices("--size", "M, S,M", SIZES) == ["M", "S"]
    with pytest.raises(UsageError, match="--size has no choice 'L': choose from XS, S, M"):
        parse_choices("--size", "S,L", SIZES)
    with pytest.raises(UsageError, match="--size is empty"):
        parse_choices("--size", " ", SIZES)


def test_missing_values_are_not_measured():
    assert tables.seconds(None) == tables.percent(None) == tables.number(None) == "not measured"
    assert [tables.seconds(s) for s in (12.3, 0.0123, 4.5e-5)] == ["12.3 s", "12.3 ms", "45 us"]
    assert tables.number(2.5e9, "GB/s", 1e9) == "2.5 GB/s"
    text = tables.table(tables.COLUMNS["infer"], [{"name": "ours", "errors": None}])
    assert text.splitlines()[-1].count("not measured") == len(tables.NETWORK) - 1


def test_idlest_core_is_selected(monkeypatch):
    ticks = iter([{0: 100, 1: 100, 2: 100}, {0: 105, 1: 120, 2: 101}])
    monkeypatch.setattr(machine, "_idle_ticks", lambda: next(ticks))
    assert machine.idlest({0, 1, 2}, 1, seconds=0) == {1}
    monkeypatch.setattr(machine, "_idle_ticks", dict)
    assert machine.idlest({0, 1, 2}, 1, seconds=0) == {2}
