"""Folders, configs and pictures from strangers: they are read, or refused by an InputError in bounded time and memory, and nothing
in them is run."""

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
from diffusion_adagn.config import DiffusionConfig, RunConfig, read_config, to_dict, to_yaml
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
from diffusion_adagn.schema import apply, fields_of, read_json

LABELS = LabelSpace(("cat", "Dog", "tench, Tinca tinca"), original_ids=(3, 5, 7), wnids=("n1", "n2", "n3"))
MAX_SECONDS, MAX_BYTES = 20, 3 * 2**30


@pytest.fixture(autouse=True)
def _narrow(tmp_path, monkeypatch):
    """Little memory beyond what is in use, and an empty folder to work in, which must stay empty."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert not list(here.iterdir())


class Hang(BaseException):
    """Not an Exception, which would be caught on the way."""


def refused(call, *args) -> str | None:
    """The message if it is refused by an InputError, None if it is taken; any other error, and a hang, is a failure."""

    def late(*_):
        raise Hang

    # seconds of work, which a busy machine does not use up; and ten times as many for what waits without working
    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, MAX_SECONDS),
        (signal.ITIMER_REAL, signal.SIGALRM, 10 * MAX_SECONDS),
    )
    before = [signal.signal(number, late) for _, number, _ in timers]
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
    config = RunConfig(output_dir="runs/x", labels=LABELS.to_dict())
    apply(config, {"data.image_size": 8, "data.channels": 1, "model.model_channels": 16, "model.channel_mult": (1, 2),
                   "model.num_res_blocks": 1, "model.attention_resolutions": (4,), "model.num_head_channels": 16,
                   "model.norm_groups": 4, "training.max_steps": 9}, "here")  # fmt: skip
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """pipe: a pipeline folder. run: a run with a checkpoint. out: an exported folder. samples: a folder of adagn sample."""
    place = tmp_path_factory.mktemp("strangers")
    pipe = pipeline()
    pipe.save_pretrained(place / "pipe")
    export_diffusers(place / "pipe", place / "out")
    checkpoint = place / "run/checkpoints/step-00000009"
    checkpoint.mkdir(parents=True)
    (place / "run/config.yaml").write_text(to_yaml(run_config()))
    (checkpoint / "state.json").write_text(json.dumps({"step": 9, "data_fingerprint": "x", "scaler": None}))
    save_file(pipe.unet.state_dict(), checkpoint / "ema.safetensors")
    samples = place / "samples"
    samples.mkdir()
    entries = []
    for i, scale in enumerate((1.0, 1.0, 1.0)):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(samples / f"{i}.png")
        entries.append({"file": f"{i}.png", "class_id": i, "class_name": LABELS.names[i], "seed": i, "guidance": scale})
    model = {"source": str(place / "run"), "hash": "abc"}
    (samples / "samples.json").write_text(json.dumps({"model": model, "labels": LABELS.to_dict(), "images": entries}))
    return place


@pytest.fixture
def pipe(place):
    """The pipeline folder, put right again afterwards."""
    yield from _put_right(place / "pipe")


@pytest.fixture
def out(place):
    yield from _put_right(place / "out")


@pytest.fixture
def run(place):
    yield from _put_right(place / "run")


@pytest.fixture
def samples(place):
    yield from _put_right(place / "samples")


def _put_right(folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    yield folder
    for p in folder.rglob("*"):
        if p not in before and not p.is_dir():
            p.unlink()
    for p, content in before.items():
        p.write_bytes(content)


def changed(file, **changes):
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not DROPPED}))


DROPPED = object()

# ---------------------------------------------------------------------- any damage at all

ODD = [
    None, True, False, 0, -1, 1, 3, 2**31, 10**6, 10**12, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf,
    "", "null", "true", "nan", "1e400", "9" * 5000, "\0", "../../../etc/passwd", "/dev/zero", "\ud800", "\x1b[2J", "x" * 3000, "a,b",
    [], {}, [1], [[]], ["a", "a"], {"a": 1}, [0.0] * 1000, [1] * 20, [math.nan] * 1000, "[" * 3000,
]  # fmt: skip
DEEP = "[" * 1500 + "]" * 1500  # deeper than the interpreter goes; YAML takes the square of it
values = (
    st.sampled_from(ODD).map(copy.deepcopy)
    | st.text(max_size=12)
    | st.integers()
    | st.floats()
    | st.lists(st.integers(-3, 99), max_size=4)
)


def places(tree, path=()):
    found = [path] if path else []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        found += places(value, (*path, key))
    return found


@st.composite
def damaged(draw, tree):
    """The tree with a few entries dropped, replaced, doubled, renamed or put elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(tree) or [("new",)]))
        parent = tree
        for key in way:
            parent = parent[key]
        deed = draw(st.sampled_from(("replace", "replace", "drop", "double", "retype", "add")))
        if deed == "drop":
            del parent[last]
        elif deed == "double" and isinstance(parent, list):
            parent.insert(last, parent[last])
        elif deed == "retype":
            old = parent[last]
            parent[last] = draw(st.sampled_from((str(old), [old], {"x": old}, repr(old), not old)))
        elif deed == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("auto_map", "quantization_config", "_class_name", "a.b", "", "<<")))] = draw(
                values
            )
        else:
            parent[last] = draw(values)
        if not isinstance(tree, dict) or not tree:
            break
    return tree


@st.composite
def contents(draw, tree):
    """What a file may hold in place of this tree."""
    kind = draw(st.sampled_from(("tree",) * 6 + ("cut", "flipped", "twice", "deep", "rubbish", "text")))
    text = json.dumps(draw(damaged(tree)) if kind == "tree" else tree).encode()
    at = draw(st.integers(0, len(text)))
    if kind == "cut":
        return text[:at]
    if kind == "flipped":
        return text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
    if kind == "twice":
        return text[:at] + text[draw(st.integers(0, at)) :]
    if kind == "deep":
        return text.replace(b"null", DEEP.encode()) if b"null" in text else DEEP.encode()
    if kind == "rubbish":
        return draw(st.binary(max_size=60))
    return draw(st.text(max_size=60)).encode("utf-8", "surrogatepass") if kind == "text" else text


def fuzz(strategy, check, examples):
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def test(given):
        refused(check, given)

    test()


def written(file, call):
    return lambda content: (file.write_bytes(content), call())


FILES = {  # what is hurt, and how it is read
    "config": ("run/config.yaml", lambda place: read_config(place / "run/config.yaml")),
    "run": ("run/config.yaml", lambda place: open_pipeline(place / "run")),
    "state": ("run/checkpoints/step-00000009/state.json", lambda place: open_pipeline(place / "run")),
    "index": ("pipe/model_index.json", lambda place: ClassConditionalPipeline.from_pretrained(place / "pipe")),
    "unet": ("pipe/unet/config.json", lambda place: ClassConditionalPipeline.from_pretrained(place / "pipe")),
    "scheduler": ("pipe/scheduler/scheduler_config.json", lambda place: ClassConditionalPipeline.from_pretrained(place / "pipe")),
    "exported index": ("out/model_index.json", lambda place: open_diffusers(place / "out")),
    "exported unet": ("out/unet/config.json", lambda place: open_diffusers(place / "out")),
    "exported scheduler": ("out/scheduler/scheduler_config.json", lambda place: open_diffusers(place / "out")),
    "samples": ("samples/samples.json", lambda place: (recorded_data(sampled_from(place / "samples") or "x"), read_image_set(place / "samples"))),
}  # fmt: skip


def hurt(place, what, examples):
    name, call = FILES[what]
    file = place / name
    before = file.read_bytes()
    tree = to_dict(run_config()) if file.suffix == ".yaml" else json.loads(before)
    assert refused(call, place) is None
    try:
        fuzz(contents(tree), written(file, lambda: call(place)), examples)
    finally:
        file.write_bytes(before)


KEYS = [key for key, _, _ in fields_of(RunConfig)]
WORDS = st.sampled_from([str(v) for v in ODD]) | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)
OVERRIDES = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), WORDS, min_size=1, max_size=3)
ASKED = st.text(max_size=30) | st.text("catDog,: 0123nulidme-", max_size=40) | values | st.lists(values, max_size=4)


def weights_hurt(place):
    """(content of the weights' file with a few bytes changed)."""
    whole = (place / "pipe/unet/diffusion_pytorch_model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    spots = st.lists(st.tuples(st.integers(0, header), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3)

    def apply_(changes):
        content = bytearray(whole)
        for at, some in changes:
            content[at : at + len(some)] = some
        return bytes(content)

    return spots.map(apply_) | st.integers(0, len(whole)).map(lambda n: whole[:n])


def others(place, what, examples):
    if what == "overrides":
        fuzz(OVERRIDES, lambda words: read_config(None, words), examples)
    elif what == "labels":
        fuzz(damaged(LABELS.to_dict()) | values, LabelSpace.from_dict, examples)
    elif what == "classes":
        fuzz(ASKED, LABELS.parse, examples)
    else:
        file = place / "pipe/unet/diffusion_pytorch_model.safetensors"
        before = file.read_bytes()
        try:
            fuzz(
                weights_hurt(place),
                written(file, lambda: ClassConditionalPipeline.from_pretrained(place / "pipe")),
                examples,
            )
        finally:
            file.write_bytes(before)


OTHERS = ("overrides", "labels", "classes", "weights")


@pytest.mark.parametrize("what", FILES)
def test_a_damaged_file_is_refused_or_read(place, what):
    hurt(place, what, 8 if what in ("config", "run", "state") else 15)


@pytest.mark.parametrize("what", OTHERS)
def test_damaged_words_are_refused_or_read(place, what):
    others(place, what, 50)


@pytest.mark.slow
@pytest.mark.parametrize("what", FILES)
def test_many_damaged_files(place, what):
    hurt(place, what, 300)


@pytest.mark.slow
@pytest.mark.parametrize("what", OTHERS)
def test_many_damaged_words(place, what):
    others(place, what, 500 if what == "weights" else 2000)


# ---------------------------------------------------------------------- nothing is run


class Payload:
    """Writes the marker where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def payload(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it works
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
        assert "safetensors" in refused(call, folder)


def test_a_checkpoint_that_is_a_pickle(run, payload):
    torch.save(payload, run / "checkpoints/step-00000009/ema.safetensors")
    assert "cannot be read as safetensors" in refused(open_pipeline, run)


def test_adm_checkpoints_and_npz_with_objects(tmp_path, payload):
    for content in (payload, {"time_embed.0.weight": payload}, {payload: 1}):
        torch.save(content, tmp_path / "m.pt")
        assert "run code" in refused(load_adm, tmp_path / "m.pt")
    (tmp_path / "m.pt").write_bytes(pickle.dumps(payload))
    assert refused(load_adm, tmp_path / "m.pt")
    np.savez(tmp_path / "p.npz", arr_0=np.array([payload], dtype=object))
    assert "no .npz" in refused(read_image_set, tmp_path / "p.npz")
    np.savez(tmp_path / "p.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8), arr_1=np.array([payload], dtype=object))
    assert "no .npz" in refused(read_image_set, tmp_path / "p.npz")


def test_code_in_a_folder_is_never_imported(pipe, out, tmp_path):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass AdaGNUNet: pass\nclass Pipeline: pass\n"
    for folder, call in ((pipe, ClassConditionalPipeline.from_pretrained), (out, open_diffusers)):
        for name in ("evil.py", "pipeline.py", "unet/evil.py", "scheduler/evil.py", "adagn_label_pipeline.py"):
            (folder / name).write_text(code)
        auto = {"auto_map": {"AutoModel": "evil.AdaGNUNet", "AutoConfig": "evil.Pipeline"}}
        changed(folder / "model_index.json", custom_pipeline="evil", **auto)
        changed(folder / "scheduler/scheduler_config.json", **auto)
        assert refused(call, folder) is None
        changed(folder / "unet/config.json", quantization_config={"quant_method": "evil"}, **auto)
        refused(call, folder)
        for part in ("unet", "scheduler"):
            changed(folder / "model_index.json", **{part: ["evil", "AdaGNUNet"]})
            refused(call, folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:pathlib.Path.touch [{marker}]",
        "data: !!python/object/new:os.system ['touch {marker}']",
        "training: {{lr: !!python/name:os.system }}",
        "data: {{source: !!python/module:antigravity }}",
    ],
)
def test_yaml_makes_no_objects(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text.format(marker=tmp_path / "marker"))
    assert "not YAML" in refused(read_config, tmp_path / "c.yaml")
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------------- paths


def test_names_of_pictures_stay_in_their_folder(samples, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "secret.png")
    index = samples / "samples.json"
    for name in ("../secret.png", str(tmp_path / "secret.png"), "..", "", ".", "\0", "x" * 5000, "a/../../secret.png"):
        record = json.loads(index.read_text())
        record["images"][0]["file"] = name
        index.write_text(json.dumps(record))
        assert "broken picture" in refused(read_image_set, samples)


def test_pipes_and_devices_are_not_waited_for(pipe, run, samples):
    for file, call in (
        (pipe / "model_index.json", lambda: ClassConditionalPipeline.from_pretrained(pipe)),
        (pipe / "unet/config.json", lambda: ClassConditionalPipeline.from_pretrained(pipe)),
        (pipe / "unet/diffusion_pytorch_model.safetensors", lambda: ClassConditionalPipeline.from_pretrained(pipe)),
        (pipe / "scheduler/scheduler_config.json", lambda: ClassConditionalPipeline.from_pretrained(pipe)),
        (run / "checkpoints/step-00000009/ema.safetensors", lambda: open_pipeline(run)),
        (run / "config.yaml", lambda: open_pipeline(run)),
        (samples / "0.png", lambda: read_image_set(samples)),
    ):
        before = file.read_bytes()
        for make in (
            os.mkfifo,
            lambda f: f.symlink_to("/dev/zero"),
            lambda f: f.symlink_to(f),
            Path.mkdir,
        ):
            file.unlink()
            make(file)
            assert refused(call)
            file.rmdir() if file.is_dir() else file.unlink()
            file.write_bytes(before)


def test_a_shard_list_is_not_followed(pipe, tmp_path):
    weights = pipe / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../../../elsewhere.safetensors")
    (pipe / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "safetensors only" in refused(ClassConditionalPipeline.from_pretrained, pipe)


def test_weights_in_parts_are_read(pipe):
    weights = pipe / "unet/diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    weights.unlink()
    for i, names in enumerate((list(whole)[::2], list(whole)[1::2]), 1):
        save_file(
            {n: whole[n] for n in names}, weights.with_name(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
        )
    again = ClassConditionalPipeline.from_pretrained(pipe).unet.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_odd_names_of_checkpoints_are_passed_over(run):
    for name in ("step-abc", "step-", "step-" + "9" * 200, "step-٣٣٣٣٣٣٣٣", "step-1"):
        (run / "checkpoints" / name).mkdir(exist_ok=True)
        (run / "checkpoints" / name / "state.json").write_text("{}")
    assert [c.name for c in checkpoints(run / "checkpoints")] == ["step-00000009"]


def test_odd_sources_have_no_data():
    for source in ("\0", "x" * 5000, "\ud800"):
        assert recorded_data(source) is None


# ---------------------------------------------------------------------- too much

HUGE = [
    ("model_channels", 10**6),
    ("model_channels", 10**300),
    ("num_res_blocks", 10**9),
    ("channel_mult", [1] * 20_000),
    ("channel_mult", [10**9]),
    ("channel_mult", [1e308, 1e308]),
    ("channel_mult", [math.nan]),
    ("class_tokens", 10**12),
    ("norm_groups", True),
    ("dropout", math.nan),
    ("norm_eps", -math.inf),
    ("num_heads", "many"),
    ("num_heads", -1),
]


@pytest.mark.parametrize(("name", "value"), HUGE)
def test_networks_that_no_machine_holds(pipe, tmp_path, name, value):
    attend = {"conditioning": "cross_attention"} if name == "class_tokens" else {}
    (tmp_path / "c.yaml").write_text(
        json.dumps({"model": {name: value} | attend}).replace("NaN", ".nan").replace("-Infinity", "-.inf")
    )
    assert name in refused(read_config, tmp_path / "c.yaml")
    changed(pipe / "unet/config.json", **{name: value}, **attend)
    assert name in refused(ClassConditionalPipeline.from_pretrained, pipe)
    if not isinstance(value, bool | str) and value != 10**300 and name not in ("dropout", "norm_eps", "num_heads"):
        config = (
            to_dict(run_config())["model"]
            | {"sample_size": 8, "in_channels": 1, "num_classes": 3, name: value}
            | attend
        )
        config.pop("class_conditional")
        if value != [math.nan]:
            assert refused(estimate_cost, config)


def test_how_much_it_would_be_is_told():
    assert "GiB" in refused(read_config, None, {"model.model_channels": "1000000"})
    assert "GiB" in refused(read_config, None, {"data.image_size": "8192", "model.model_channels": "8192"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.batch_size", 10**12),
        ("diffusion.num_train_timesteps", 10**12),
        ("data.image_size", 10**6),
        ("training.preview_count", 10**9),
        ("training.lr", 10**400),
        ("training.seed", 10**30),
        ("training.lr", "1e400"),
        ("training.max_steps", "9" * 5000),
        ("training.max_steps", True),
        ("output_dir", "a\0b"),
    ],
)
def test_settings_beyond_all_use(tmp_path, key, value):
    section, _, name = key.rpartition(".")
    (tmp_path / "c.yaml").write_text(json.dumps({section: {name: value}} if section else {name: value}))
    told = refused(read_config, tmp_path / "c.yaml")
    assert name in told or "a number of" in told
    if isinstance(value, str) or value < 10**50:
        assert key in refused(read_config, None, {key: str(value).replace("True", "yes")})


@pytest.mark.parametrize(("name", "value"), [("sample_size", 10**6), ("num_classes", 10**9), ("in_channels", 10**9), ("sample_size", -8), ("num_classes", -1)])  # fmt: skip
def test_pictures_and_classes_beyond_all_use(pipe, name, value):
    changed(pipe / "unet/config.json", **{name: value})
    assert name in refused(ClassConditionalPipeline.from_pretrained, pipe)


def test_a_config_larger_than_its_weights_takes_no_memory(pipe, run):
    changed(pipe / "unet/config.json", model_channels=1024)
    assert "do not fit" in refused(ClassConditionalPipeline.from_pretrained, pipe)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("model_channels: 16", "model_channels: 1024"))
    assert "does not fit" in refused(open_pipeline, run)


def test_exported_networks_beyond_all_use(out):
    for change in ({"layers_per_block": 10**9}, {"block_out_channels": [16] * 10**5}, {"block_out_channels": [10**9, 10**9]}, {"layers_per_block": True},
                   {"norm_num_groups": 0}, {"num_class_embeds": 10**12}, {"down_block_types": ["os"] * 2}):  # fmt: skip
        before = (out / "unet/config.json").read_bytes()
        changed(out / "unet/config.json", **change)
        assert refused(open_diffusers, out)
        (out / "unet/config.json").write_bytes(before)


def header(file, entries, data=b""):
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors_that_claim_what_they_have_not(pipe):
    file = pipe / "unet/diffusion_pytorch_model.safetensors"
    vast = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    for entries in (
        {"conv_in.weight": vast},
        {"conv_in.weight": vast | {"shape": [2**40, 2**40]}},
        {
            "conv_in.weight": vast | {"shape": [], "data_offsets": [0, 4]},
            "conv_in.bias": vast | {"shape": [], "data_offsets": [0, 4]},
        },
        {"conv_in.weight": vast | {"shape": [0, 10**18], "data_offsets": [0, 0]}},
        {"conv_in.weight": {}},
        {"conv_in.weight": json.loads("[" * 90 + "]" * 90)},
    ):
        header(file, entries, b"abcd")
        assert refused(ClassConditionalPipeline.from_pretrained, pipe)
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert refused(ClassConditionalPipeline.from_pretrained, pipe)
    file.write_bytes(struct.pack("<Q", 6000) + (b'{"a":' + b"[" * 5000).ljust(6000))
    assert refused(ClassConditionalPipeline.from_pretrained, pipe)


def test_tensors_that_claim_more_than_their_storage(tmp_path):
    for tensor in (
        torch.zeros(1).expand(10**6, 10**6),
        torch.empty(10**6, 10**6, device="meta"),
        torch.zeros(2, 2).to_sparse(),
    ):
        torch.save({"time_embed.0.weight": tensor}, tmp_path / "m.pt")
        assert "time_embed.0.weight" in refused(load_adm, tmp_path / "m.pt")


@pytest.mark.parametrize("squeezed", [False, True])
def test_npz_that_claim_what_they_have_not(tmp_path, squeezed):
    """Refused by what they claim, since memory may be promised that is not there."""
    save = np.savez_compressed if squeezed else np.savez
    pixels, labels = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int64)
    save(tmp_path / "p.npz", arr_0=pixels, arr_1=labels)
    assert refused(read_image_set, tmp_path / "p.npz") is None
    way = zipfile.ZIP_DEFLATED if squeezed else zipfile.ZIP_STORED
    for at in (0, 1):
        for shape in (
            (10**6, 10**3, 10**3, 3),
            (4, 8, 8, 3),
            (2, 8, 8, 3),
            (10**30,),
            (-3, 8, 8, 3),
            (0, 10**18, 8, 3),
        ):
            with zipfile.ZipFile(tmp_path / "p.npz", "w", way) as archive:
                for i, array in enumerate((pixels, labels)):
                    header = io.BytesIO()
                    dtype = np.lib.format.dtype_to_descr(array.dtype)
                    claim = {"descr": dtype, "fortran_order": False, "shape": shape if i == at else array.shape}
                    np.lib.format.write_array_header_1_0(header, claim)
                    archive.writestr(f"arr_{i}.npy", header.getvalue() + array.tobytes())
            assert f"arr_{at} claims" in refused(read_image_set, tmp_path / "p.npz")


def test_npz_whose_directory_claims_it_too(tmp_path):
    header = io.BytesIO()
    shape = (10**6, 10**3, 10**3, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    size = len(header.getvalue()) + math.prod(shape)
    with zipfile.ZipFile(tmp_path / "p.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1000))
        archive.infolist()[0].file_size = size
    assert "arr_0 claims 3,000,000,000,000 bytes" in refused(read_image_set, tmp_path / "p.npz")


def test_npz_members_that_are_no_arrays(tmp_path):
    for name in ("arr_0", "arr_0.npy"):
        with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
            archive.writestr(name, b"rubbish, of no shape")
        assert "no .npz" in refused(read_image_set, tmp_path / "p.npz")


def test_pictures_that_no_memory_holds(samples):
    Image.new("L", (9000, 9000)).save(samples / "0.png")
    record = json.loads((samples / "samples.json").read_text())
    record["images"] = [record["images"][0]] * 10**4
    (samples / "samples.json").write_text(json.dumps(record))
    assert "GiB" in refused(read_image_set, samples)


# ---------------------------------------------------------------------- text that explodes

LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm")
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "model: &m {num_heads: 2}\ntraining: {<<: *m}",
        "[" * 100_000,
        "- " * 50_000,
        "{a: " * 50_000,
        "a: " + "[" * 60 + "]" * 60,
        "training: {lr: 1, lr: 2}",
        "? [a]\n: b",
        "? {a: b}\n: c",
        "\n".join(f"a{i}: 1" for i in range(3_000)),
        "training: {lr: 1" + ":59" * 300_000 + "}",
        "training: {lr: 0x" + "f" * 300_000 + "}",
        "a: 2001-99-99",
        "a: !!bool maybe",
        "a: !!int ''",
        "a: !!timestamp x",
        "a: !!binary ':'",
        "data: !!set {a, b}",
        "data: {source: !!binary aGVsbG8=}",
        "data: {source: 2001-01-01}",
        "labels: {}",
        "labels: [a]",
        "labels: {names: cat}",
        "labels: {names: [a, a]}",
        "%YAML 9.9\n---\na: 1",
        "a: 1\n---\nb: 2",
        "\0",
        "a: " + "x" * (5 * 2**20),
    ],
    ids=range(30),
)
def test_yaml_that_explodes_or_means_nothing(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert within_calls(2_000_000, refused, read_config, tmp_path / "c.yaml")


def test_a_config_of_a_hundred_megabytes(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"a: 1\n" * (20 * 2**20))
    assert "more than" in refused(read_config, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"a":' * 10**6,
        '{"a": ' + "9" * 5000 + "}",
        '"a"',
        "",
        '{"a": ' + "[" * 60 + "]" * 60 + "}",
        "\ufeff{}",
    ],
)
def test_json_that_explodes_or_means_nothing(pipe, tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert refused(read_json, tmp_path / "a.json")
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        before = (pipe / name).read_bytes()
        (pipe / name).write_text(text)
        assert refused(ClassConditionalPipeline.from_pretrained, pipe)
        (pipe / name).write_bytes(before)


# ---------------------------------------------------------------------- classes


def test_label_spaces_that_are_none():
    for change in (
        {"names": ["a", "a"]},
        {"names": [""]},
        {"names": ["\x07"]},
        {"names": "abc"},
        {"names": [None]},
        {"names": [["a"]]},
        {"names": [True]},
        {"names": ["x" * (MAX_NAME_CHARS + 1)]},
        {"names": ["same"] * 10**5},
        {"original_ids": [1]},
        {"original_ids": [1, 2, "x"]},
        {"original_ids": [1, 2, math.nan]},
        {"wnids": [1, 2, 3]},
        {"wnids": {"a": 1}},
        {"has_null": "false"},
        {"has_null": None},
    ):
        assert refused(LabelSpace.from_dict, LABELS.to_dict() | change)
    assert "at most" in refused(LabelSpace.from_dict, {"names": list(range(MAX_CLASSES + 1))})
    for none in (None, [], "names", {}, 3):
        assert "not a label space" in refused(LabelSpace.from_dict, none)


def test_names_can_be_printed_and_written():
    space = LabelSpace(("\x1b[2Jcat\x07", "\ud800dog", "می\u200cخواهم"))
    assert space.names == ("[2Jcat", "?dog", "می\u200cخواهم")
    assert LabelSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    "".join(space.names).encode()


def test_long_requests_are_answered_at_once():
    many = LabelSpace(tuple(f"class {i}" for i in range(1000)))
    assert len(within_calls(200_000, many.parse, "class 7," * 3000)) == 3000
    for asked in (
        "9" * 5000,
        "id:" + "9" * 5000,
        "-" + "9" * 5000,
        "," * 10**5,
        "x" * 10**5,
        10**30,
        -1,
        {"a": 1},
        [[1]],
        [math.nan],
    ):
        assert within_calls(1_000_000, refused, many.parse, asked)


def test_classes_and_network_must_agree(pipe, out, run):
    for names in (["a"], [str(i) for i in range(10**4)]):
        changed(pipe / "model_index.json", labels={"names": names})
        assert "3 classes" in refused(ClassConditionalPipeline.from_pretrained, pipe)
        (run / "config.yaml").write_text(json.dumps(to_dict(run_config()) | {"labels": {"names": names}}))
        assert "does not fit" in refused(open_pipeline, run)
    for null_id in (0, 2, 4, -1, 10**9, "3", True, 3.0):
        changed(out / "model_index.json", null_id=null_id)
        assert "null_id" in refused(open_diffusers, out)


def test_a_run_whose_config_does_not_say_what_it_is(run):
    whole = to_dict(run_config())
    for section, name in (("data", "image_size"), ("data", "channels"), (None, "labels")):
        config = copy.deepcopy(whole)
        (config[section] if section else config).pop(name)
        (run / "config.yaml").write_text(json.dumps(config))
        assert name in refused(open_pipeline, run)


def test_states_that_are_none(run):
    for content in ("[]", "{}", '{"step": "9"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', "[" * 10**5):
        (run / "checkpoints/step-00000009/state.json").write_text(content)
        assert "state.json" in refused(open_pipeline, run)


# ---------------------------------------------------------------------- names

ODD_NAMES = [
    "..",
    ".",
    "",
    "/",
    "../../outside",
    "/etc/passwd",
    "a/../b",
    "a\\b",
    "\0",
    "\ud800",
    "x" * 3000,
    "a\nb",
    "\x1b[2J",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, name):
    (tmp_path / "outside").write_text("secret")
    checkpoint = tmp_path / "run/step-00000009"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({name: {"bytes": 6, "sha256": "0"}}))
    wrong = verify(checkpoint)
    assert "no file of a checkpoint" in wrong and len(wrong) < 300 and wrong.isprintable()


def test_manifests_and_states_that_are_none(tmp_path):
    checkpoint = tmp_path / "step-00000009"
    checkpoint.mkdir()
    assert "missing" in refused(read_state, checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"")
    odd = [{"model.safetensors": v} for v in ODD] + [{"model.safetensors": {"bytes": v}} for v in ODD] + ODD
    for content in [*(json.dumps(v) for v in odd), DEEP, "[" * 10**6, '{"a":' * 10**6, "", "\0"]:
        for name in ("manifest.json", "state.json"):
            (checkpoint / name).write_text(content)
        assert 10 < len(verify(checkpoint)) < 500
        assert "damaged" in refused(load_weights, checkpoint / "model.safetensors", None)
        assert "damaged" in refused(read_state, checkpoint)
    for step in (None, "9", -1, True, 1.5, [9], {}):
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "data_fingerprint": "x", "scaler": None}))
        assert "its step is" in refused(read_state, checkpoint)


ENTRIES = [[{"file": n}] for n in [*ODD_NAMES, "../samples.json", "notes.txt", None, 3, [], {}]] + [None, 3, "ab", {"a": 1}, [[]], [None], [{}]]  # fmt: skip


@pytest.mark.parametrize("entries", [*ENTRIES, DEEP], ids=range(len(ENTRIES) + 1))
def test_samples_that_list_what_is_not_theirs_are_not_cleared(samples, entries):
    (samples.parent / "outside").write_text("mine")
    (samples / "notes.txt").write_text("mine")
    (samples / "samples.json").write_text('{"images": ' + (DEEP if entries is DEEP else json.dumps(entries)) + "}")
    before = sorted(p for p in samples.parent.rglob("*"))
    assert "is damaged" in refused(_clear, samples, True)
    assert sorted(p for p in samples.parent.rglob("*")) == before
    (samples.parent / "outside").unlink()


@pytest.mark.parametrize("name", ["1.png", "grid.png", "samples-g2.npz"])
def test_a_folder_among_samples_is_not_cleared(samples, name):
    (samples / name).unlink(missing_ok=True)
    (samples / name).mkdir()
    before = sorted(samples.iterdir())
    assert f"{name} is a folder" in refused(_clear, samples, True)
    assert sorted(samples.iterdir()) == before
    (samples / name).rmdir()


def test_names_that_are_gone_or_link_elsewhere(samples):
    (samples.parent / "outside").write_text("mine")
    (samples / "0.png").unlink()
    (samples / "1.png").unlink()
    (samples / "1.png").symlink_to(samples.parent / "outside")
    assert refused(_clear, samples, True) is None
    assert not list(samples.iterdir())
    assert (samples.parent / "outside").read_text() == "mine"
    (samples.parent / "outside").unlink()


# ---------------------------------------------------------------------- noise schedules


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_scheduler_of_ours_is_read(pipe, sampler):
    made = make_scheduler(DiffusionConfig(schedule="cosine", prediction="v", zero_snr=sampler != "heun"), sampler)
    made.save_pretrained(pipe / "scheduler")
    changed(pipe / "model_index.json", scheduler=["diffusers", type(made).__name__])
    again = ClassConditionalPipeline.from_pretrained(pipe).scheduler
    assert type(again) is type(made) and torch.equal(again.alphas_cumprod, made.alphas_cumprod)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in made.config.items() if k[0] != "_"
    }


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": 10**5 + 1},
        {"num_train_timesteps": 1.5},
        {"num_train_timesteps": math.nan},
        {"num_train_timesteps": True},
        {"trained_betas": [math.nan] * 1000},
        {"trained_betas": [0.1] * 999},
        {"trained_betas": [2.0] * 1000},
        {"trained_betas": [-0.1] * 1000},
        {"trained_betas": "betas"},
        {"trained_betas": 10**12},
        {"beta_start": math.nan},
        {"beta_end": math.inf},
        {"beta_end": 2},
        {"beta_start": "low"},
        {"beta_schedule": "odd"},
        {"prediction_type": "flow_prediction"},
        {"prediction_type": []},
        {"timestep_spacing": "odd"},
        {"timestep_spacing": None},
        {"steps_offset": 10**12},
        {"clip_sample": "no"},
    ],
)
def test_schedules_that_are_none(pipe, out, change):
    for folder, call in ((pipe, ClassConditionalPipeline.from_pretrained), (out, open_diffusers)):
        changed(folder / "scheduler/scheduler_config.json", **change)
        assert refused(call, folder)


def test_solvers_of_vast_order(pipe):
    make_scheduler(DiffusionConfig(), "dpm++").save_pretrained(pipe / "scheduler")
    changed(pipe / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    changed(pipe / "scheduler/scheduler_config.json", solver_order=10**10)
    assert "solver_order" in refused(ClassConditionalPipeline.from_pretrained, pipe)


@pytest.mark.parametrize(
    "change", [{"clip_x0": "no"}, {"ema_decay": "x"}, {"trained_steps": "7"}, {"trained_steps": True}, {"guidance_convention": [1]}, {"scheduler": []},
               {"scheduler": 3}, {"scheduler": ["diffusers"]}, {"scheduler": [[], {}]}, {"labels": None}],
)  # fmt: skip
def test_indexes_that_are_none(pipe, change):
    changed(pipe / "model_index.json", **change)
    assert refused(ClassConditionalPipeline.from_pretrained, pipe)


def test_an_imported_folder_is_written_whole_or_not_at_all(out, tmp_path):
    changed(out / "unet/config.json", layers_per_block=10**9)
    assert refused(import_diffusers, out, tmp_path / "imported")
    assert not list(tmp_path.glob("*import*"))
