"""The benchmark command with a tiny network."""

import json
import re
import shlex

import pytest
from conftest import ROOT, one_line

from benchmarks import compare

QUICK = ["--size", "XS", "--device", "cpu", "--dtype", "fp32", "--rounds", "1", "--sample-ms", "0", "--memory", "none"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The command for one GPU, on the CPU with a tiny network, and the other tables."""
    out = tmp_path_factory.mktemp("results")
    copy_bytes = compare.limits.copy_bytes
    compare.limits.copy_bytes = lambda device: 2**20  # the default, 256 MiB, is slow
    argv = [*QUICK, "--what", "train,infer,sample,op,data", "--steps", "4", "--out", str(out)]
    assert compare.main(argv) == 0
    compare.limits.copy_bytes = copy_bytes
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


@pytest.mark.slow
def test_every_table_is_written(results):
    found, text = results
    assert [g["task"] for g in found["groups"]] == ["train", "infer", "sample", "op", "data"]
    for group in found["groups"]:
        assert group["rows"] and all(row["median_s"] > 0 for row in group["rows"])
        assert f"## {group['task']}" in text
    for group in found["groups"][:2]:
        sides = {(row["side"], row["memory_format"]) for row in group["rows"]}
        assert sides == {(side, memory_format) for side in ("ours", "diffusers") for memory_format in ("nchw", "nhwc")}
        assert all(row["errors"][0] < 1e-5 and row["floor_fraction"] > 0 for row in group["rows"])
        best = [r for r in group["ratios"] if r["best"]]
        assert len(best) == 1 and best[0]["peer"].startswith("diffusers")
        speed = {row["name"]: row["median_s"] for row in group["rows"]}
        assert speed[best[0]["peer"]] == min(s for name, s in speed.items() if name.startswith("diffusers"))
        assert group["flops_per_image"]["ours"] == group["flops_per_image"]["diffusers"]


@pytest.mark.slow
def test_sampling_loop_is_compared_with_bare_calls(results):
    sample = results[0]["groups"][2]
    ratios = {r["peer"].split(" (")[0]: r for r in sample["ratios"] if r["ours"].startswith("our loop")}
    assert set(ratios) == {"diffusers' loop", "our bare calls", "our bare calls, image path alone"}
    bare = ratios["our bare calls"]
    assert bare["overhead"] == pytest.approx(1 / bare["median"] - 1)
    assert sample["image_difference"] < 1e-4


@pytest.mark.slow
def test_report_names_machine_and_missing_parts(results):
    found, text = results
    for word in (found["machine"]["cpu"], found["machine"]["torch"], found["command"], found["date"]):
        assert word in text
    assert re.search(r"\| GPU \| not measured \|", text)
    assert "- CUDA: this run is on the CPU" in text


@pytest.mark.slow
def test_growth_has_plot_and_exponents(tmp_path, monkeypatch):
    axes = compare.grow.axes
    monkeypatch.setattr(compare.limits, "copy_bytes", lambda device: 2**20)
    monkeypatch.setattr(
        compare.grow, "axes", lambda *args: {k: v[:2] for k, v in axes(*args).items() if k in ("batch", "classes")}
    )
    assert compare.main([*QUICK, "--what", "grow", "--out", str(tmp_path)]) == 0
    group = json.loads((tmp_path / "results.json").read_text())["groups"][0]
    assert (tmp_path / group["plot"]).stat().st_size > 1000
    assert set(group["exponents"]) == {f"{w} {a}" for w in ("infer", "train") for a in ("batch", "classes")}
    assert f"![grow, XS, fp32, batch 2, 1 thread]({group['plot']})" in (tmp_path / "results.md").read_text()


def test_skipped_tables_are_listed(tmp_path):
    assert compare.main([*QUICK, "--what", "train,data", "--limit-minutes", "0", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["groups"] == []
    skipped = [text for text in found["not_measured"] if "the limit of 0 minutes was reached" in text]
    assert [text.split(",")[0] for text in skipped] == ["train", "data"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--size", "L"], "choose from XS, S, M"),
        (["--what", "fly"], "choose from train, infer, sample, op, data, grow"),
        (["--against", "edm"], "choose from diffusers, denoising-diffusion-pytorch"),
        (["--dtype", "fp8"], "choose from fp32, bf16, fp16"),
        (["--device", "tpu"], "choose from cpu, cuda"),
        (["--threads", "two"], "such as 1,2"),
        (["--threads", "100000"], "choose from 1 to"),
        (["--rounds", "0"], "at least 1"),
        (["--rounds", "many"], "invalid int value"),
        (["--resample", "cubic"], "choose from"),
    ],
)
def test_bad_argument_is_one_line_with_choices(capsys, argv, words):
    assert compare.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and words in error


def test_unwritable_output_is_an_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert compare.main([*QUICK, "--what", "data", "--out", str(tmp_path / "file")]) == 2
    assert "cannot write to" in one_line(capsys.readouterr().err)


def test_readme_commands_are_valid(monkeypatch):
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: True)
    commands = re.findall(r"python -m benchmarks\.compare (.*)", (ROOT / "benchmarks/README.md").read_text())
    assert len(commands) == 2
    for command in commands:
        assert compare.parse(shlex.split(command)).size == ["S", "M"]
