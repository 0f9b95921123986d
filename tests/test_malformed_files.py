"""Untrusted folders, configs and images are read, or rejected with an InputError in bounded time and memory.

Code in them is never run.
"""

import copy
import io
import json
import math
import os
import pickle
import resource
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet, within_calls
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig, RunConfig, as_config, read_config, to_dict, to_yaml
from diffusion_adagn.diffusion.schedule import SAMPLERS, make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.image_set import read_image_set, sampled_from
from diffusion_adagn.interop.adm import load_adm
from diffusion_adagn.interop.export import export_diffusers, import_diffusers, open_diffusers
from diffusion_adagn.labels import MAX_CLASSES, MAX_NAME_CHARS
from diffusion_adagn.models.cost import estimate_cost
from diffusion_adagn.runs.checkpoint import load_weights, read_state, verify
from diffusion_adagn.runs.layout import checkpoints
from diffusion_adagn.runs.recorded import recorded_data
from diffusion_adagn.sampling.generate import _clear
from diffusion_adagn.sampling.load import open_pipeline
from diffusion_adagn.schema import fields_of, read_document

LABELS = LabelSpace(("cat", "Dog", "tench, Tinca tinca"), original_ids=(3, 5, 7), wnids=("n1", "n2", "n3"))
MAX_SECONDS, MAX_BYTES = 20, 3 * 2**30


@pytest.fixture(autouse=True)
def _limited_memory(tmp_path, monkeypatch):
    """Limits the additional memory, and works in an empty folder, which must stay empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert not list(folder.iterdir())


class Hang(BaseException):
    """Not an Exception, which the code under test may catch."""


def rejection(call, *args) -> str | None:
    """The message of the InputError of a call, or None if it succeeds. Another error or a time-out fails the test."""

    def time_out(*_):
        raise Hang

    # a limit of CPU time, which does not depend on the load; and a ten times larger limit for calls that only wait
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, MAX_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM,
        10 * MAX_SECONDS),)  # fmt: skip
    before = [signal.signal(number, time_out) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        call(*args)
    except InputError as error:
        assert 10 < len(str(error)) < 5000
        return str(error)
    finally:
        for (timer, number, _), handler in zip(timers, before):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
    return None


def pipeline(**unet):
    return ClassConditionalPipeline(
        tiny_unet(**unet), make_scheduler(DiffusionConfig()), LABELS, ema_decay=0.9, trained_steps=7
    )


def run_config():
    return as_config({
        "output_dir": "runs/x", "labels": LABELS.to_dict(), "data.image_size": 8, "data.channels": 1, "model.model_channels": 16,
        "model.channel_mult": (1, 2), "model.num_res_blocks": 1, "model.attention_resolutions": (4,),
        "model.num_head_channels": 16, "model.norm_groups": 4, "training.max_steps": 9,
    })  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with pipe (a pipeline), run (with a checkpoint), out (an export) and samples (by adagn sample)."""
    root = tmp_path_factory.mktemp("untrusted")
    pipe = pipeline()
    pipe.save_pretrained(root / "pipe")
    export_diffusers(root / "pipe", root / "out")
    checkpoint = root / "run/checkpoints/step-00000009"
    checkpoint.mkdir(parents=True)
    (root / "run/config.yaml").write_text(to_yaml(run_config()))
    (checkpoint / "state.json").write_text(json.dumps({"step": 9, "data_fingerprint": "x", "scaler": None}))
    save_file(pipe.unet.state_dict(), checkpoint / "ema.safetensors")
    samples = root / "samples"
    samples.mkdir()
    entries = []
    for i, scale in enumerate((1.0, 1.0, 1.0)):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(samples / f"{i}.png")
        entries.append({"file": f"{i}.png", "class_id": i, "class_name": LABELS.names[i], "seed": i, "guidance": scale})
    model = {"source": str(root / "run"), "hash": "abc"}
    (samples / "samples.json").write_text(json.dumps({"model": model, "labels": LABELS.to_dict(), "images": entries}))
    return root


@pytest.fixture
def pipe(root):
    """The pipeline folder, restored afterwards."""
    yield from _restored(root / "pipe")


@pytest.fixture
def out(root):
    yield from _restored(root / "out")


@pytest.fixture
def run(root):
    yield from _restored(root / "run")


@pytest.fixture
def samples(root):
    yield from _restored(root / "samples")


def _restored(folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    yield folder
    for p in folder.rglob("*"):
        if p not in before and not p.is_dir():
            p.unlink()
    for p, content in before.items():
        p.write_bytes(content)


def change_json(file, **changes):
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not REMOVED}))


REMOVED = object()

# ---------------------------------------------------------------------- random corruption

ODD_VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 10**6, 10**12, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf,
    "", "null", "true", "nan", "1e400", "9" * 5000, "\0", "../../../etc/passwd", "/dev/zero", "\ud800", "\x1b[2J", "x" * 3000, "a,b",
    [], {}, [1], [[]], ["a", "a"], {"a": 1}, [0.0] * 1000, [1] * 20, [math.nan] * 1000, "[" * 3000,
]  # fmt: skip
DEEP_LIST = "[" * 1500 + "]" * 1500  # deeper than the recursion limit; YAML needs quadratic time
values = (st.sampled_from(ODD_VALUES).map(copy.deepcopy) | st.text(max_size=12) | st.integers() | st.floats() | st.lists(st.integers(-3,
    99), max_size=4))  # fmt: skip


def tree_paths(tree, path=()):
    paths = [path] if path else []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        paths += tree_paths(value, (*path, key))
    return paths


@st.composite
def corrupted_tree(draw, tree):
    """The tree with a few entries removed, replaced, repeated or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(tree_paths(tree) or [("new",)]))
        parent = tree
        for key in parents:
            parent = parent[key]
        action = draw(st.sampled_from(("replace", "replace", "drop", "double", "retype", "add")))
        if action == "drop":
            del parent[last]
        elif action == "double" and isinstance(parent, list):
            parent.insert(last, parent[last])
        elif action == "retype":
            old = parent[last]
            parent[last] = draw(st.sampled_from((str(old), [old], {"x": old}, repr(old), not old)))
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("auto_map", "quantization_config", "_class_name", "a.b", "", "<<")))] = draw(
                values
            )
        else:
            parent[last] = draw(values)
        if not isinstance(tree, dict) or not tree:
            break
    return tree


@st.composite
def corrupted_contents(draw, tree):
    """The contents of a corrupted file of this tree."""
    fault = draw(st.sampled_from(("tree",) * 6 + ("cut", "flipped", "twice", "deep", "random", "text")))
    text = json.dumps(draw(corrupted_tree(tree)) if fault == "tree" else tree).encode()
    position = draw(st.integers(0, len(text)))
    if fault == "cut":
        return text[:position]
    if fault == "flipped":
        return text[:position] + bytes([draw(st.integers(0, 255))]) + text[position + 1 :]
    if fault == "twice":
        return text[:position] + text[draw(st.integers(0, position)) :]
    if fault == "deep":
        return text.replace(b"null", DEEP_LIST.encode()) if b"null" in text else DEEP_LIST.encode()
    if fault == "random":
        return draw(st.binary(max_size=60))
    return draw(st.text(max_size=60)).encode("utf-8", "surrogatepass") if fault == "text" else text


def fuzz(strategy, check, examples):
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def test(value):
        rejection(check, value)

    test()


def write_and_read(file, call):
    return lambda content: (file.write_bytes(content), call())


FILES = {  # name -> the file to corrupt, and how it is read
    "config": ("run/config.yaml", lambda root: read_config(root / "run/config.yaml")),
    "run": ("run/config.yaml", lambda root: open_pipeline(root / "run")),
    "state": ("run/checkpoints/step-00000009/state.json", lambda root: open_pipeline(root / "run")),
    "index": ("pipe/model_index.json", lambda root: ClassConditionalPipeline.from_pretrained(root / "pipe")),
    "unet": ("pipe/unet/config.json", lambda root: ClassConditionalPipeline.from_pretrained(root / "pipe")),
    "scheduler": ("pipe/scheduler/scheduler_config.json", lambda root: ClassConditionalPipeline.from_pretrained(root / "pipe")),
    "exported index": ("out/model_index.json", lambda root: open_diffusers(root / "out")),
    "exported unet": ("out/unet/config.json", lambda root: open_diffusers(root / "out")),
    "exported scheduler": ("out/scheduler/scheduler_config.json", lambda root: open_diffusers(root / "out")),
    "samples": ("samples/samples.json", lambda root: (recorded_data(sampled_from(root / "samples") or "x"), read_image_set(root / "samples"))),
}  # fmt: skip


def fuzz_file(root, target, examples):
    name, call = FILES[target]
    file = root / name
    before = file.read_bytes()
    tree = to_dict(run_config()) if file.suffix == ".yaml" else json.loads(before)
    assert rejection(call, root) is None
    try:
        fuzz(corrupted_contents(tree), write_and_read(file, lambda: call(root)), examples)
    finally:
        file.write_bytes(before)


KEYS = [setting.key for setting in fields_of(RunConfig)]
WORDS = (
    st.sampled_from([str(v) for v in ODD_VALUES]) | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)
)
OVERRIDES = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), WORDS, min_size=1, max_size=3)
CLASS_SPECS = (
    st.text(max_size=30) | st.text("catDog,: 0123nulidme-", max_size=40) | values | st.lists(values, max_size=4)
)


def corrupted_weights(root):
    """Contents of the weights' file with a few changed bytes, or cut."""
    whole = (root / "pipe/unet/diffusion_pytorch_model.safetensors").read_bytes()
    write_header = 8 + struct.unpack("<Q", whole[:8])[0]
    byte_changes = st.lists(
        st.tuples(st.integers(0, write_header), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3
    )

    def apply_(changes):
        content = bytearray(whole)
        for offset, new in changes:
            content[offset : offset + len(new)] = new
        return bytes(content)

    return byte_changes.map(apply_) | st.integers(0, len(whole)).map(lambda n: whole[:n])


def fuzz_input(root, target, examples):
    if target == "overrides":
        fuzz(OVERRIDES, lambda words: read_config(None, words), examples)
    elif target == "labels":
        fuzz(corrupted_tree(LABELS.to_dict()) | values, LabelSpace.from_dict, examples)
    elif target == "classes":
        fuzz(CLASS_SPECS, LABELS.parse, examples)
    else:
        file = root / "pipe/unet/diffusion_pytorch_model.safetensors"
        before = file.read_bytes()
        try:
            fuzz(corrupted_weights(root), write_and_read(file,
                lambda: ClassConditionalPipeline.from_pretrained(root / "pipe")), examples,)  # fmt: skip
        finally:
            file.write_bytes(before)


INPUTS = ("overrides", "labels", "classes", "weights")


@pytest.mark.parametrize("target", FILES)
def test_corrupted_files_raise_input_errors(root, target):
    fuzz_file(root, target, 8 if target in ("config", "run", "state") else 15)


@pytest.mark.parametrize("target", INPUTS)
def test_corrupted_input_raises_input_errors(root, target):
    fuzz_input(root, target, 50)


@pytest.mark.slow
@pytest.mark.parametrize("target", FILES)
def test_many_corrupted_files(root, target):
    fuzz_file(root, target, 300)


@pytest.mark.slow
@pytest.mark.parametrize("target", INPUTS)
def test_many_corrupted_inputs(root, target):
    fuzz_input(root, target, 500 if target == "weights" else 2000)


# ---------------------------------------------------------------------- code is never run


class Payload:
    """Creates the marker file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def payload(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the payload works
    marker.unlink()
    yield Payload(marker)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", [f"diffusion_pytorch_model{end}" for end in (".bin", ".pt", ".pkl", ".ckpt", ".safetensors")]
)
def test_pickled_weights_are_never_opened(pipe, out, payload, name):
    for folder, call in ((pipe, ClassConditionalPipeline.from_pretrained), (out, open_diffusers)):
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
        with open(folder / "unet" / name, "wb") as file:
            torch.save(payload, file)
        assert "safetensors" in rejection(call, folder)


def test_pickled_checkpoint_is_rejected(run, payload):
    torch.save(payload, run / "checkpoints/step-00000009/ema.safetensors")
    assert "cannot be read as safetensors" in rejection(open_pipeline, run)


def test_pickled_objects_are_rejected(tmp_path, payload):
    for content in (payload, {"time_embed.0.weight": payload}, {payload: 1}):
        torch.save(content, tmp_path / "m.pt")
        assert "run code" in rejection(load_adm, tmp_path / "m.pt")
    (tmp_path / "m.pt").write_bytes(pickle.dumps(payload))
    assert rejection(load_adm, tmp_path / "m.pt")
    np.savez(tmp_path / "p.npz", arr_0=np.array([payload], dtype=object))
    assert "not an .npz" in rejection(read_image_set, tmp_path / "p.npz")
    np.savez(tmp_path / "p.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8), arr_1=np.array([payload], dtype=object))
    assert "not an .npz" in rejection(read_image_set, tmp_path / "p.npz")


def test_code_in_a_folder_is_ignored(pipe, out, tmp_path):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass AdaGNUNet: pass\nclass Pipeline: pass\n"
    for folder, call in ((pipe, ClassConditionalPipeline.from_pretrained), (out, open_diffusers)):
        for name in ("evil.py", "pipeline.py", "unet/evil.py", "scheduler/evil.py", "adagn_label_pipeline.py"):
            (folder / name).write_text(code)
        auto = {"auto_map": {"AutoModel": "evil.AdaGNUNet", "AutoConfig": "evil.Pipeline"}}
        change_json(folder / "model_index.json", custom_pipeline="evil", **auto)
        change_json(folder / "scheduler/scheduler_config.json", **auto)
        assert rejection(call, folder) is None
        change_json(folder / "unet/config.json", quantization_config={"quant_method": "evil"}, **auto)
        rejection(call, folder)
        for part in ("unet", "scheduler"):
            change_json(folder / "model_index.json", **{part: ["evil", "AdaGNUNet"]})
            rejection(call, folder)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:pathlib.Path.touch [{marker}]",
    "data: !!python/object/new:os.system ['touch {marker}']", "training: {{lr: !!python/name:os.system }}",
    "data: {{source: !!python/module:antigravity }}",],)  # fmt: skip
def test_yaml_creates_no_objects(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text.format(marker=tmp_path / "marker"))
    assert "not valid YAML" in rejection(read_config, tmp_path / "c.yaml")
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------------- paths


def test_image_names_stay_in_folder(samples, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "secret.png")
    index = samples / "samples.json"
    for name in ("../secret.png", str(tmp_path / "secret.png"), "..", "", ".", "\0", "x" * 5000, "a/../../secret.png"):
        record = json.loads(index.read_text())
        record["images"][0]["file"] = name
        index.write_text(json.dumps(record))
        assert "broken image" in rejection(read_image_set, samples)


def test_pipes_and_devices_are_rejected(pipe, run, samples):
    for file, call in ((pipe / "model_index.json", lambda: ClassConditionalPipeline.from_pretrained(pipe)),
        (pipe / "unet/config.json", lambda: ClassConditionalPipeline.from_pretrained(pipe)),
        (pipe / "unet/diffusion_pytorch_model.safetensors", lambda: ClassConditionalPipeline.from_pretrained(pipe)),
        (pipe / "scheduler/scheduler_config.json", lambda: ClassConditionalPipeline.from_pretrained(pipe)),
        (run / "checkpoints/step-00000009/ema.safetensors", lambda: open_pipeline(run)), (run / "config.yaml",
        lambda: open_pipeline(run)), (samples / "0.png", lambda: read_image_set(samples)),):  # fmt: skip
        before = file.read_bytes()
        for create in (os.mkfifo, lambda f: f.symlink_to("/dev/zero"), lambda f: f.symlink_to(f), Path.mkdir,
            ):  # fmt: skip
            file.unlink()
            create(file)
            assert rejection(call)
            file.rmdir() if file.is_dir() else file.unlink()
            file.write_bytes(before)


def test_shard_list_is_not_followed(pipe, tmp_path):
    weights = pipe / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../../../elsewhere.safetensors")
    (pipe / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "safetensors only" in rejection(ClassConditionalPipeline.from_pretrained, pipe)


def test_sharded_weights_are_read(pipe):
    weights = pipe / "unet/diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    weights.unlink()
    for i, names in enumerate((list(whole)[::2], list(whole)[1::2]), 1):
        save_file(
            {n: whole[n] for n in names}, weights.with_name(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
        )
    again = ClassConditionalPipeline.from_pretrained(pipe).unet.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_odd_checkpoint_names_are_ignored(run):
    for name in ("step-abc", "step-", "step-" + "9" * 200, "step-٣٣٣٣٣٣٣٣", "step-1"):
        (run / "checkpoints" / name).mkdir(exist_ok=True)
        (run / "checkpoints" / name / "state.json").write_text("{}")
    assert [c.name for c in checkpoints(run / "checkpoints")] == ["step-00000009"]


def test_odd_sources_have_no_data():
    for source in ("\0", "x" * 5000, "\ud800"):
        assert recorded_data(source) is None


# ---------------------------------------------------------------------- huge values

HUGE_SETTINGS = [("model_channels", 10**6), ("model_channels", 10**300), ("num_res_blocks", 10**9), ("channel_mult",
    [1] * 20_000), ("channel_mult", [10**9]), ("channel_mult", [1e308, 1e308]), ("channel_mult", [math.nan]),
    ("class_tokens", 10**12), ("norm_groups", True), ("dropout", math.nan), ("norm_eps", -math.inf), ("num_heads",
    "many"), ("num_heads", -1),]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), HUGE_SETTINGS)
def test_huge_networks_are_rejected(pipe, tmp_path, name, value):
    attend = {"conditioning": "cross_attention"} if name == "class_tokens" else {}
    (tmp_path / "c.yaml").write_text(
        json.dumps({"model": {name: value} | attend}).replace("NaN", ".nan").replace("-Infinity", "-.inf")
    )
    assert name in rejection(read_config, tmp_path / "c.yaml")
    change_json(pipe / "unet/config.json", **{name: value}, **attend)
    assert name in rejection(ClassConditionalPipeline.from_pretrained, pipe)
    if not isinstance(value, bool | str) and value != 10**300 and name not in ("dropout", "norm_eps", "num_heads"):
        config = (to_dict(run_config())["model"] | {"sample_size": 8, "in_channels": 1, "num_classes": 3,
            name: value} | attend)  # fmt: skip
        config.pop("class_conditional")
        if value != [math.nan]:
            assert rejection(estimate_cost, config)


def test_error_names_the_memory_needed():
    assert "GiB" in rejection(read_config, None, {"model.model_channels": "1000000"})
    assert "GiB" in rejection(read_config, None, {"data.image_size": "8192", "model.model_channels": "8192"})


@pytest.mark.parametrize(("key", "value"), [("training.batch_size", 10**12), ("diffusion.num_train_timesteps",
    10**12), ("data.image_size", 10**6), ("training.preview_count", 10**9), ("training.lr", 10**400),
    ("training.seed", 10**30), ("training.lr", "1e400"), ("training.max_steps", "9" * 5000), ("training.max_steps",
    True), ("output_dir", "a\0b"),],)  # fmt: skip
def test_huge_settings_are_rejected(tmp_path, key, value):
    section, _, name = key.rpartition(".")
    (tmp_path / "c.yaml").write_text(json.dumps({section: {name: value}} if section else {name: value}))
    message = rejection(read_config, tmp_path / "c.yaml")
    assert name in message or "a number of" in message
    if isinstance(value, str) or value < 10**50:
        assert key in rejection(read_config, None, {key: str(value).replace("True", "yes")})


@pytest.mark.parametrize(("name", "value"), [("sample_size", 10**6), ("num_classes", 10**9), ("in_channels", 10**9), ("sample_size", -8), ("num_classes", -1)])  # fmt: skip
def test_huge_image_and_class_counts(pipe, name, value):
    change_json(pipe / "unet/config.json", **{name: value})
    assert name in rejection(ClassConditionalPipeline.from_pretrained, pipe)


def test_oversized_config_allocates_no_memory(pipe, run):
    change_json(pipe / "unet/config.json", model_channels=1024)
    assert "do not fit" in rejection(ClassConditionalPipeline.from_pretrained, pipe)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("model_channels: 16", "model_channels: 1024"))
    assert "does not fit" in rejection(open_pipeline, run)


def test_huge_exported_networks_are_rejected(out):
    for change in ({"layers_per_block": 10**9}, {"block_out_channels": [16] * 10**5}, {"block_out_channels": [10**9, 10**9]}, {"layers_per_block": True},
                   {"norm_num_groups": 0}, {"num_class_embeds": 10**12}, {"down_block_types": ["os"] * 2}):  # fmt: skip
        before = (out / "unet/config.json").read_bytes()
        change_json(out / "unet/config.json", **change)
        assert rejection(open_diffusers, out)
        (out / "unet/config.json").write_bytes(before)


def write_header(file, entries, data=b""):
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors_with_false_headers(pipe):
    file = pipe / "unet/diffusion_pytorch_model.safetensors"
    vast = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    for entries in ({"conv_in.weight": vast}, {"conv_in.weight": vast | {"shape": [2**40, 2**40]}},
        {"conv_in.weight": vast | {"shape": [], "data_offsets": [0, 4]}, "conv_in.bias": vast | {"shape": [],
        "data_offsets": [0, 4]},}, {"conv_in.weight": vast | {"shape": [0, 10**18], "data_offsets": [0, 0]}},
        {"conv_in.weight": {}}, {"conv_in.weight": json.loads("[" * 90 + "]" * 90)},):  # fmt: skip
        write_header(file, entries, b"abcd")
        assert rejection(ClassConditionalPipeline.from_pretrained, pipe)
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert rejection(ClassConditionalPipeline.from_pretrained, pipe)
    file.write_bytes(struct.pack("<Q", 6000) + (b'{"a":' + b"[" * 5000).ljust(6000))
    assert rejection(ClassConditionalPipeline.from_pretrained, pipe)


def test_tensors_larger_than_their_storage(tmp_path):
    for tensor in (torch.zeros(1).expand(10**6, 10**6), torch.empty(10**6, 10**6, device="meta"), torch.zeros(2,
        2).to_sparse(),):  # fmt: skip
        torch.save({"time_embed.0.weight": tensor}, tmp_path / "m.pt")
        assert "time_embed.0.weight" in rejection(load_adm, tmp_path / "m.pt")


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_with_false_headers(tmp_path, compressed):
    """Rejected by the claimed size, since the system may promise memory that it does not have."""
    save = np.savez_compressed if compressed else np.savez
    pixels, labels = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int64)
    save(tmp_path / "p.npz", arr_0=pixels, arr_1=labels)
    assert rejection(read_image_set, tmp_path / "p.npz") is None
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    for changed in (0, 1):
        for shape in ((10**6, 10**3, 10**3, 3), (4, 8, 8, 3), (2, 8, 8, 3), (10**30,), (-3, 8, 8, 3), (0, 10**18, 8,
            3),):  # fmt: skip
            with zipfile.ZipFile(tmp_path / "p.npz", "w", method) as archive:
                for i, array in enumerate((pixels, labels)):
                    write_header = io.BytesIO()
                    dtype = np.lib.format.dtype_to_descr(array.dtype)
                    claim = {"descr": dtype, "fortran_order": False, "shape": shape if i == changed else array.shape}
                    np.lib.format.write_array_header_1_0(write_header, claim)
                    archive.writestr(f"arr_{i}.npy", write_header.getvalue() + array.tobytes())
            assert f"arr_{changed} claims" in rejection(read_image_set, tmp_path / "p.npz")


def test_npz_with_false_directory(tmp_path):
    write_header = io.BytesIO()
    shape = (10**6, 10**3, 10**3, 3)
    np.lib.format.write_array_header_1_0(write_header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    size = len(write_header.getvalue()) + math.prod(shape)
    with zipfile.ZipFile(tmp_path / "p.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", write_header.getvalue() + bytes(1000))
        archive.infolist()[0].file_size = size
    assert "arr_0 claims 3,000,000,000,000 bytes" in rejection(read_image_set, tmp_path / "p.npz")


def test_npz_members_that_are_not_arrays(tmp_path):
    for name in ("arr_0", "arr_0.npy"):
        with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
            archive.writestr(name, b"random bytes, no shape")
        assert "not an .npz" in rejection(read_image_set, tmp_path / "p.npz")


def test_too_many_images_for_memory(samples):
    Image.new("L", (9000, 9000)).save(samples / "0.png")
    record = json.loads((samples / "samples.json").read_text())
    record["images"] = [record["images"][0]] * 10**4
    (samples / "samples.json").write_text(json.dumps(record))
    assert "GiB" in rejection(read_image_set, samples)


# ---------------------------------------------------------------------- expensive text

NESTED_ALIASES = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm")
)


@pytest.mark.parametrize("text", [NESTED_ALIASES, "a: &a [*a]", "a: &a {b: *a}",
    "model: &m {num_heads: 2}\ntraining: {<<: *m}", "[" * 100_000, "- " * 50_000, "{a: " * 50_000,
    "a: " + "[" * 60 + "]" * 60, "training: {lr: 1, lr: 2}", "? [a]\n: b", "? {a: b}\n: c",
    "\n".join(f"a{i}: 1" for i in range(3_000)), "training: {lr: 1" + ":59" * 300_000 + "}",
    "training: {lr: 0x" + "f" * 300_000 + "}", "a: 2001-99-99", "a: !!bool maybe", "a: !!int ''", "a: !!timestamp x",
    "a: !!binary ':'", "data: !!set {a, b}", "data: {source: !!binary aGVsbG8=}", "data: {source: 2001-01-01}",
    "labels: {}", "labels: [a]", "labels: {names: cat}", "labels: {names: [a, a]}", "%YAML 9.9\n---\na: 1",
    "a: 1\n---\nb: 2", "\0", "a: " + "x" * (5 * 2**20),], ids=range(30),)  # fmt: skip
def test_expensive_or_invalid_yaml(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert within_calls(2_000_000, rejection, read_config, tmp_path / "c.yaml")


def test_config_of_100_megabytes(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"a: 1\n" * (20 * 2**20))
    assert "larger than" in rejection(read_config, tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6, '{"a": ' + "9" * 5000 + "}", '"a"', "",
    '{"a": ' + "[" * 60 + "]" * 60 + "}", "\ufeff{}",],)  # fmt: skip
def test_expensive_or_invalid_json(pipe, tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    harmless = text.startswith('{"a": [[')  # nested, but small and of an unknown key
    assert (rejection(read_document, tmp_path / "a.json") is None) == harmless
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        before = (pipe / name).read_bytes()
        (pipe / name).write_text(text)
        assert rejection(ClassConditionalPipeline.from_pretrained, pipe) or harmless
        (pipe / name).write_bytes(before)


# ---------------------------------------------------------------------- classes


def test_invalid_label_spaces():
    for change in ({"names": ["a", "a"]}, {"names": [""]}, {"names": ["\x07"]}, {"names": "abc"}, {"names": [None]},
        {"names": [["a"]]}, {"names": [True]}, {"names": ["x" * (MAX_NAME_CHARS + 1)]}, {"names": ["same"] * 10**5},
        {"original_ids": [1]}, {"original_ids": [1, 2, "x"]}, {"original_ids": [1, 2, math.nan]}, {"wnids": [1, 2,
        3]}, {"wnids": {"a": 1}}, {"has_null": "false"}, {"has_null": None},):  # fmt: skip
        assert rejection(LabelSpace.from_dict, LABELS.to_dict() | change)
    assert "at most" in rejection(LabelSpace.from_dict, {"names": list(range(MAX_CLASSES + 1))})
    for values_ in (None, [], "names", {}, 3):
        assert "not a label space" in rejection(LabelSpace.from_dict, values_)


def test_class_names_are_printable():
    space = LabelSpace(("\x1b[2Jcat\x07", "\ud800dog", "می\u200cخواهم"))
    assert space.names == ("[2Jcat", "?dog", "می\u200cخواهم")
    assert LabelSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    "".join(space.names).encode()


def test_long_class_lists_are_fast():
    many = LabelSpace(tuple(f"class {i}" for i in range(1000)))
    assert len(within_calls(200_000, many.parse, "class 7," * 3000)) == 3000
    for classes in ("9" * 5000, "id:" + "9" * 5000, "-" + "9" * 5000, "," * 10**5, "x" * 10**5, 10**30, -1, {"a": 1},
        [[1]], [math.nan],):  # fmt: skip
        assert within_calls(1_000_000, rejection, many.parse, classes)


def test_classes_must_match_network(pipe, out, run):
    for names in (["a"], [str(i) for i in range(10**4)]):
        change_json(pipe / "model_index.json", labels={"names": names})
        assert "3 classes" in rejection(ClassConditionalPipeline.from_pretrained, pipe)
        (run / "config.yaml").write_text(json.dumps(to_dict(run_config()) | {"labels": {"names": names}}))
        assert "does not fit" in rejection(open_pipeline, run)
    for null_id in (0, 2, 4, -1, 10**9, "3", True, 3.0):
        change_json(out / "model_index.json", null_id=null_id)
        assert "null_id" in rejection(open_diffusers, out)


def test_incomplete_run_config_is_rejected(run):
    whole = to_dict(run_config())
    for section, name in (("data", "image_size"), ("data", "channels"), (None, "labels")):
        config = copy.deepcopy(whole)
        (config[section] if section else config).pop(name)
        (run / "config.yaml").write_text(json.dumps(config))
        assert name in rejection(open_pipeline, run)


def test_invalid_states(run):
    for content in ("[]", "{}", '{"step": "9"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', "[" * 10**5):
        (run / "checkpoints/step-00000009/state.json").write_text(content)
        assert "state.json" in rejection(open_pipeline, run)


# ---------------------------------------------------------------------- names

ODD_NAMES = ["..", ".", "", "/", "../../outside", "/etc/passwd", "a/../b", "a\\b", "\0", "\ud800", "x" * 3000, "a\nb",
    "\x1b[2J",]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_manifest_names_stay_in_folder(tmp_path, name):
    (tmp_path / "outside").write_text("secret")
    checkpoint = tmp_path / "run/step-00000009"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({name: {"bytes": 6, "sha256": "0"}}))
    wrong = verify(checkpoint)
    assert "not a file of a checkpoint" in wrong and len(wrong) < 300 and wrong.isprintable()


def test_invalid_manifests_and_states(tmp_path):
    checkpoint = tmp_path / "step-00000009"
    checkpoint.mkdir()
    assert "missing" in rejection(read_state, checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"")
    odd = (
        [{"model.safetensors": v} for v in ODD_VALUES]
        + [{"model.safetensors": {"bytes": v}} for v in ODD_VALUES]
        + ODD_VALUES
    )
    for content in [*(json.dumps(v) for v in odd), DEEP_LIST, "[" * 10**6, '{"a":' * 10**6, "", "\0"]:
        for name in ("manifest.json", "state.json"):
            (checkpoint / name).write_text(content)
        assert 10 < len(verify(checkpoint)) < 500
        assert "corrupted" in rejection(load_weights, checkpoint / "model.safetensors", None)
        assert "corrupted" in rejection(read_state, checkpoint)
    for step in (None, "9", -1, True, 1.5, [9], {}):
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "data_fingerprint": "x", "scaler": None}))
        assert "step: " in rejection(read_state, checkpoint)


ENTRIES = [[{"file": n}] for n in [*ODD_NAMES, "../samples.json", "notes.txt", None, 3, [], {}]] + [None, 3, "ab", {"a": 1}, [[]], [None], [{}]]  # fmt: skip


@pytest.mark.parametrize("entries", [*ENTRIES, DEEP_LIST], ids=range(len(ENTRIES) + 1))
def test_overwrite_rejects_foreign_files(samples, entries):
    (samples.parent / "outside").write_text("mine")
    (samples / "notes.txt").write_text("mine")
    (samples / "samples.json").write_text(
        '{"images": ' + (DEEP_LIST if entries is DEEP_LIST else json.dumps(entries)) + "}"
    )
    before = sorted(p for p in samples.parent.rglob("*"))
    reason = "nested too deeply" if entries is DEEP_LIST else "is corrupted"
    assert reason in rejection(_clear, samples, True)
    assert sorted(p for p in samples.parent.rglob("*")) == before
    (samples.parent / "outside").unlink()


@pytest.mark.parametrize("name", ["1.png", "grid.png", "samples-g2.npz"])
def test_overwrite_rejects_folders(samples, name):
    (samples / name).unlink(missing_ok=True)
    (samples / name).mkdir()
    before = sorted(samples.iterdir())
    assert f"{name} is a folder" in rejection(_clear, samples, True)
    assert sorted(samples.iterdir()) == before
    (samples / name).rmdir()


def test_overwrite_ignores_missing_files_and_links(samples):
    (samples.parent / "outside").write_text("mine")
    (samples / "0.png").unlink()
    (samples / "1.png").unlink()
    (samples / "1.png").symlink_to(samples.parent / "outside")
    assert rejection(_clear, samples, True) is None
    assert not list(samples.iterdir())
    assert (samples.parent / "outside").read_text() == "mine"
    (samples.parent / "outside").unlink()


# ---------------------------------------------------------------------- noise schedules


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_own_schedulers_are_read(pipe, sampler):
    scheduler = make_scheduler(DiffusionConfig(schedule="cosine", prediction="v", zero_snr=sampler != "heun"), sampler)
    scheduler.save_pretrained(pipe / "scheduler")
    change_json(pipe / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
    again = ClassConditionalPipeline.from_pretrained(pipe).scheduler
    assert type(again) is type(scheduler) and torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }


@pytest.mark.parametrize("change", [{"num_train_timesteps": 0}, {"num_train_timesteps": 10**9},
    {"num_train_timesteps": 10**5 + 1}, {"num_train_timesteps": 1.5}, {"num_train_timesteps": math.nan},
    {"num_train_timesteps": True}, {"trained_betas": [math.nan] * 1000}, {"trained_betas": [0.1] * 999},
    {"trained_betas": [2.0] * 1000}, {"trained_betas": [-0.1] * 1000}, {"trained_betas": "betas"},
    {"trained_betas": 10**12}, {"beta_start": math.nan}, {"beta_end": math.inf}, {"beta_end": 2},
    {"beta_start": "low"}, {"beta_schedule": "odd"}, {"prediction_type": "flow_prediction"}, {"prediction_type": []},
    {"timestep_spacing": "odd"}, {"timestep_spacing": None}, {"steps_offset": 10**12}, {"clip_sample": "no"},],
    )  # fmt: skip
def test_invalid_schedules(pipe, out, change):
    for folder, call in ((pipe, ClassConditionalPipeline.from_pretrained), (out, open_diffusers)):
        change_json(folder / "scheduler/scheduler_config.json", **change)
        assert rejection(call, folder)


def test_huge_solver_order_is_rejected(pipe):
    make_scheduler(DiffusionConfig(), "dpm++").save_pretrained(pipe / "scheduler")
    change_json(pipe / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    change_json(pipe / "scheduler/scheduler_config.json", solver_order=10**10)
    assert "solver_order" in rejection(ClassConditionalPipeline.from_pretrained, pipe)


@pytest.mark.parametrize(
    "change", [{"clip_x0": "no"}, {"ema_decay": "x"}, {"trained_steps": "7"}, {"trained_steps": True}, {"guidance_convention": [1]}, {"scheduler": []},
               {"scheduler": 3}, {"scheduler": ["diffusers"]}, {"scheduler": [[], {}]}, {"labels": None}],
)  # fmt: skip
def test_invalid_indexes(pipe, change):
    change_json(pipe / "model_index.json", **change)
    assert rejection(ClassConditionalPipeline.from_pretrained, pipe)


def test_failed_import_writes_nothing(out, tmp_path):
    change_json(out / "unet/config.json", layers_per_block=10**9)
    assert rejection(import_diffusers, out, tmp_path / "imported")
    assert not list(tmp_path.glob("*import*"))
