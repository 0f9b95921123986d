"""Untrusted files are read, or rejected with an InputError in bounded time and memory. Code in them is never run."""

import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import within_calls
from hypothesis import strategies as st

from malformed import CHECKPOINT, CONFIG, DEEP_LIST, INDEX, LABELS, MODEL, ODD_VALUES, Payload, READ  # isort: skip
from malformed import SCHEDULER, TEXTS, UNET, VALUES, WEIGHTS, WORDS, change_json, corrupted_bytes  # isort: skip
from malformed import corrupted_contents, corrupted_tree, from_pipe, fuzz, limited_memory, make_folders  # isort: skip
from malformed import npy, rejected, rejection, safetensors, spoiled, write, write_npz  # isort: skip
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_adagn import LabelSpace
from diffusion_adagn.config import DiffusionConfig, RunConfig, read_config, to_dict
from diffusion_adagn.diffusion.schedule import SAMPLERS, make_scheduler
from diffusion_adagn.evaluation.image_set import read_image_set, sampled_from
from diffusion_adagn.interop.adm import load_adm
from diffusion_adagn.interop.export import import_diffusers
from diffusion_adagn.labels import MAX_CLASSES, MAX_NAME_CHARS
from diffusion_adagn.models.cost import estimate_cost
from diffusion_adagn.runs.checkpoint import load_weights, read_state, verify
from diffusion_adagn.runs.layout import checkpoints
from diffusion_adagn.runs.recorded import recorded_data
from diffusion_adagn.sampling.generate import _clear
from diffusion_adagn.schema import fields_of, read_document


@pytest.fixture(autouse=True)
def _limited_memory(tmp_path, whole):
    with limited_memory(tmp_path / "here"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "untrusted")


pipe, run, samples = (pytest.fixture(name=n)(lambda root, n=n: root / n) for n in ("pipe", "run", "samples"))


@pytest.fixture
def marker(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    (tmp_path / "marker").unlink()  # a payload works
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------------- random corruption

FILES = {  # the file to corrupt -> how it is read, if not as its folder
    "run/config.yaml": None, f"run/{CHECKPOINT}/state.json": None,
    **{f"{folder}/{file}": None for folder in ("pipe", "out") for file in (INDEX, UNET, SCHEDULER)},
    "samples/samples.json": lambda folder: (recorded_data(sampled_from(folder) or "x"), read_image_set(folder)),
    "config/config.yaml": lambda folder: read_config(folder / "config.yaml"),
}  # fmt: skip
KEYS = [setting.key for setting in fields_of(RunConfig)]
OVERRIDES = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), WORDS, min_size=1, max_size=3)
CLASSES = st.one_of(TEXTS, st.text("catDog,: 0123nulidme-", max_size=40), VALUES, st.lists(VALUES, max_size=4))
INPUTS = {"overrides": (OVERRIDES, lambda words: read_config(None, words)), "classes": (CLASSES, LABELS.parse),
          "labels": (corrupted_tree(LABELS.to_dict()) | VALUES, LabelSpace.from_dict)}  # fmt: skip
MANY = pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])


@MANY
@pytest.mark.parametrize("name", FILES)
def test_corrupted_files_raise_input_errors(root, name, many):
    tree = to_dict(CONFIG) if name.endswith(".yaml") else json.loads((root / name).read_text())
    call = FILES[name] or READ[name.partition("/")[0]]
    assert rejection(call, (root / name.partition("/")[0])) is None
    examples = 300 if many else 5 if "run" in name or "config/" in name else 10
    fuzz(corrupted_contents(tree), lambda content: spoiled(root, name, content, call), examples)


@MANY
@pytest.mark.parametrize("target", INPUTS)
def test_corrupted_input_raises_input_errors(target, many):
    fuzz(*INPUTS[target], 2000 if many else 50)


@MANY
def test_corrupted_weights_raise_input_errors(root, many):
    whole = (root / "pipe" / WEIGHTS).read_bytes()
    corrupted = corrupted_bytes(whole, 8 + struct.unpack("<Q", whole[:8])[0])
    fuzz(corrupted, lambda content: spoiled(root, f"pipe/{WEIGHTS}", content), 500 if many else 25)


# ---------------------------------------------------------------------- code is never run


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".ckpt", ".safetensors"])
def test_pickled_weights_are_never_opened(root, marker, suffix):
    for folder, call in ((root / name, READ[name]) for name in ("pipe", "out")):
        (folder / WEIGHTS).unlink()
        with open((folder / WEIGHTS).with_suffix(suffix), "wb") as file:
            torch.save(Payload(marker), file)
        assert "safetensors" in rejection(call, folder)


def test_pickled_checkpoint_is_rejected(run, marker):
    torch.save(Payload(marker), run / CHECKPOINT / "ema.safetensors")
    assert "cannot be read as safetensors" in rejection(READ["run"], run)


def test_pickled_objects_are_rejected(tmp_path, marker):
    payload = Payload(marker)
    for content in (payload, {"time_embed.0.weight": payload}, {payload: 1}):
        torch.save(content, tmp_path / "m.pt")
        assert "run code" in rejection(load_adm, tmp_path / "m.pt")
    assert rejected(tmp_path / "m.pt", pickle.dumps(payload), load_adm, tmp_path / "m.pt")
    objects = np.array([payload], dtype=object)
    for arrays in ({"arr_0": objects}, {"arr_0": np.zeros((1, 2, 2, 3), np.uint8), "arr_1": objects}):
        np.savez(tmp_path / "p.npz", **arrays)
        assert "not an .npz" in rejection(read_image_set, tmp_path / "p.npz")


def test_code_in_a_folder_is_ignored(root, marker):
    code = f"open({str(marker)!r}, 'w')\nclass AdaGNUNet: pass\nclass Pipeline: pass\n"
    auto = {"auto_map": {"AutoModel": "evil.AdaGNUNet", "AutoConfig": "evil.Pipeline"}}
    for folder, call in ((root / name, READ[name]) for name in ("pipe", "out")):
        for name in ("evil.py", "pipeline.py", "unet/evil.py", "scheduler/evil.py", "adagn_label_pipeline.py"):
            write(folder / name, code)
        change_json(folder / INDEX, custom_pipeline="evil", **auto)
        change_json(folder / SCHEDULER, **auto)
        assert rejection(call, folder) is None
        change_json(folder / UNET, quantization_config={"quant_method": "evil"}, **auto)
        rejection(call, folder)
        for part in ("unet", "scheduler"):
            change_json(folder / INDEX, **{part: ["evil", "AdaGNUNet"]})
            rejection(call, folder)


@pytest.mark.parametrize("text", [
    "!!python/object/apply:pathlib.Path.touch [MARKER]", "data: !!python/object/new:os.system ['touch MARKER']",
    "training: {lr: !!python/name:os.system }", "data: {source: !!python/module:antigravity }",
])  # fmt: skip
def test_yaml_creates_no_objects(tmp_path, marker, text):
    file = tmp_path / "c.yaml"
    assert "not valid YAML" in rejected(file, text.replace("MARKER", str(marker)), read_config, file)


# ---------------------------------------------------------------------- paths


def test_image_names_stay_in_folder(samples, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "secret.png")
    first, *others = json.loads((samples / "samples.json").read_text())["images"]
    for name in ("../secret.png", str(tmp_path / "secret.png"), "..", "", ".", "\0", "x" * 5000, "a/../../secret.png"):
        change_json(samples / "samples.json", images=[first | {"file": name}, *others])
        assert "broken image" in rejection(read_image_set, samples)


def test_pipes_and_devices_are_rejected(root):
    names = [f"pipe/{name}" for name in (INDEX, UNET, WEIGHTS, SCHEDULER)] + ["run/config.yaml", "samples/0.png"]
    for name in (*names, f"run/{CHECKPOINT}/ema.safetensors"):
        file, folder, before = root / name, name.partition("/")[0], (root / name).read_bytes()
        for create in (os.mkfifo, lambda f: f.symlink_to("/dev/zero"), lambda f: f.symlink_to(f), Path.mkdir):
            file.unlink()
            create(file)
            assert rejection(READ[folder], root / folder)
            file.rmdir() if file.is_dir() else file.unlink()
            file.write_bytes(before)


def test_shard_list_is_not_followed(pipe, tmp_path):
    (pipe / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../../../elsewhere.safetensors")
    write(pipe / f"{WEIGHTS}.index.json", {"weight_map": names})
    assert "safetensors only" in rejection(from_pipe, pipe)


def test_sharded_weights_are_read(pipe):
    whole = load_file(pipe / WEIGHTS)
    (pipe / WEIGHTS).unlink()
    for i in (0, 1):
        shard = {name: whole[name] for name in list(whole)[i::2]}
        save_file(shard, pipe / f"unet/diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    again = from_pipe(pipe).unet.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_numbers_as_text_are_read(pipe):
    network = json.loads((pipe / UNET).read_text())
    change_json(pipe / UNET, num_classes="3", channel_mult=",".join(map(str, network["channel_mult"])))
    assert from_pipe(pipe).unet.config.num_classes == 3


def test_odd_names_are_ignored(run):
    for name in ("step-abc", "step-", "step-" + "9" * 200, "step-٣٣٣٣٣٣٣٣", "step-1"):
        (run / "checkpoints" / name).mkdir(exist_ok=True)
        write(run / "checkpoints" / name / "state.json", {})
    assert [c.name for c in checkpoints(run / "checkpoints")] == ["step-00000009"]
    assert [recorded_data(source) for source in ("\0", "x" * 5000, "\ud800")] == [None] * 3


# ---------------------------------------------------------------------- huge values


@pytest.mark.parametrize(("name", "value"), [
    ("model_channels", 10**6), ("model_channels", 10**300), ("num_res_blocks", 10**9), ("channel_mult", [1] * 20_000),
    ("channel_mult", [10**9]), ("channel_mult", [1e308, 1e308]), ("channel_mult", [math.nan]), ("class_tokens", 10**12),
    ("norm_groups", True), ("dropout", math.nan), ("norm_eps", -math.inf), ("num_heads", "many"), ("num_heads", -1),
])  # fmt: skip
def test_huge_networks_are_rejected(root, tmp_path, name, value):
    changes = {name: value} | ({"conditioning": "cross_attention"} if name == "class_tokens" else {})
    text = json.dumps({"model": changes}).replace("NaN", ".nan").replace("-Infinity", "-.inf")
    assert name in rejected(tmp_path / "c.yaml", text, read_config, tmp_path / "c.yaml")
    assert name in spoiled(root, f"pipe/{UNET}", changes)
    if name not in ("norm_groups", "dropout", "norm_eps", "num_heads") and value not in (10**300, [math.nan]):
        config = to_dict(CONFIG)["model"] | {"sample_size": 8, "in_channels": 1, "num_classes": 3} | changes
        config.pop("class_conditional")
        assert rejection(estimate_cost, config)


def test_errors_name_memory_and_are_short():
    assert rejection(read_config, None, {"model.dropout": "0" * 10**6 + "5"})
    assert "GiB" in rejection(read_config, None, {"model.model_channels": "1000000"})
    assert "GiB" in rejection(read_config, None, {"data.image_size": "8192", "model.model_channels": "8192"})


@pytest.mark.parametrize(("key", "value"), [
    ("training.batch_size", 10**12), ("diffusion.num_train_timesteps", 10**12), ("data.image_size", 10**6),
    ("training.preview_count", 10**9), ("training.lr", 10**400), ("training.seed", 10**30), ("training.lr", "1e400"),
    ("model.channel_mult", "1,x"), ("training.max_steps", "9" * 5000), ("training.max_steps", True), ("output_dir", "a\0b"),
])  # fmt: skip
def test_huge_settings_are_rejected(tmp_path, key, value):
    section, _, name = key.rpartition(".")
    values = {section: {name: value}} if section else {name: value}
    message = rejected(tmp_path / "c.yaml", values, read_config, tmp_path / "c.yaml")
    assert name in message or "a number of" in message
    if isinstance(value, str) or value < 10**50:
        assert key in rejection(read_config, None, {key: str(value).replace("True", "yes")})


def test_safetensors_with_false_headers(root):
    vast = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    four = vast | {"shape": [], "data_offsets": [0, 4]}
    shapes = vast, vast | {"shape": [2**40, 2**40]}, vast | {"shape": [0, 10**18], "data_offsets": [0, 0]}, {}
    headers = [{"conv_in.weight": shape} for shape in (*shapes, json.loads("[" * 90 + "]" * 90))]
    headers.append({"conv_in.weight": four, "conv_in.bias": four})  # two tensors at the same place
    contents = [safetensors(json.dumps(header).encode(), b"abcd") for header in headers]
    contents += [struct.pack("<Q", 2**62) + b"{}", safetensors((b'{"a":' + b"[" * 5000).ljust(6000))]
    for content in contents:
        assert spoiled(root, f"pipe/{WEIGHTS}", content)


def test_tensors_larger_than_their_storage(tmp_path):
    vast = torch.zeros(1).expand(10**6, 10**6), torch.empty(10**6, 10**6, device="meta")
    for tensor in (*vast, torch.zeros(2, 2).to_sparse()):
        torch.save({"time_embed.0.weight": tensor}, tmp_path / "m.pt")
        assert "time_embed.0.weight" in rejection(load_adm, tmp_path / "m.pt")


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_with_false_headers(tmp_path, compressed):
    """Rejected by the claimed size, since the system may promise memory that it does not have."""
    file, arrays = tmp_path / "p.npz", (np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int64))
    (np.savez_compressed if compressed else np.savez)(file, *arrays)
    assert rejection(read_image_set, file) is None
    shapes = (10**6, 10**3, 10**3, 3), (4, 8, 8, 3), (2, 8, 8, 3), (10**30,), (-3, 8, 8, 3), (0, 10**18, 8, 3)
    for shape in shapes:
        for false in (0, 1):
            members = {f"arr_{i}.npy": npy(array, shape if i == false else None) for i, array in enumerate(arrays)}
            write_npz(file, members, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
            assert f"arr_{false} claims" in rejection(read_image_set, file)


def test_npz_with_false_members(tmp_path):
    shape = (10**6, 10**3, 10**3, 3)
    content = npy(np.zeros(1000, np.uint8), shape)
    write_npz(tmp_path / "p.npz", {"arr_0.npy": content}, size=len(content) - 1000 + math.prod(shape))
    assert "arr_0 claims 3,000,000,000,000 bytes" in rejection(read_image_set, tmp_path / "p.npz")
    for name in ("arr_0", "arr_0.npy"):
        write_npz(tmp_path / "p.npz", {name: b"random bytes, no shape"}, zipfile.ZIP_STORED)
        assert "not an .npz" in rejection(read_image_set, tmp_path / "p.npz")


def test_too_many_images_for_memory(root, samples):
    Image.new("L", (9000, 9000)).save(samples / "0.png")
    first = json.loads((samples / "samples.json").read_text())["images"][0]
    assert "GiB" in spoiled(root, "samples/samples.json", {"images": [first] * 10**4})


WRONG_LABELS = [{"labels": {"names": names}} for names in (["a"], [str(i) for i in range(10**4)])]
NESTED = '{"a": ' + "[" * 60 + "]" * 60 + "}"  # harmless
TIMESTEPS = (0, 10**9, 10**5 + 1, 10**400, 1.5, math.nan, True)
CHANGES = {  # (file, what the message says) -> values, each of which is rejected
    **{(f"pipe/{UNET}", name): [{name: value} for value in values] for name, values in (
        ("sample_size", (10**6, -8)), ("num_classes", (10**9, -1)), ("in_channels", (10**9,)))},
    (f"pipe/{UNET}", "do not fit"): [{"model_channels": 1024}],
    (f"pipe/{UNET}", "num_classes: expected a whole number"): [{"num_classes": "ten"}],
    (f"pipe/{SCHEDULER}", "beta_schedule: expected linear,"): [{"beta_schedule": "foo"}],
    (f"pipe/{INDEX}", "3 classes"): WRONG_LABELS,
    ("run/config.yaml", "does not fit"): [{"model": MODEL | {"model_channels": 1024}}, *WRONG_LABELS],
    (f"run/{CHECKPOINT}/state.json", "state.json"): [
        "[]", "{}", '{"step": "9"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', "[" * 10**5
    ],
    (f"out/{INDEX}", "null_id"): [{"null_id": null_id} for null_id in (0, 2, 4, -1, 10**9, "3", True, 3.0)],
    (f"pipe/{INDEX}", ""): [
        {"clip_x0": "no"}, {"ema_decay": "x"}, {"trained_steps": "7"}, {"trained_steps": True}, {"labels": None},
        {"scheduler": []}, {"scheduler": 3}, {"scheduler": ["diffusers"]}, {"scheduler": [[], {}]},
        {"guidance_convention": [1]},
    ],
    (f"out/{UNET}", ""): [
        {"layers_per_block": 10**9}, {"layers_per_block": True}, {"block_out_channels": [16] * 10**5},
        {"block_out_channels": [10**9, 10**9]}, {"norm_num_groups": 0}, {"num_class_embeds": 10**12},
        {"down_block_types": ["os"] * 2},
    ],
    **{(f"{folder}/{SCHEDULER}", ""): [
        *({"num_train_timesteps": value} for value in TIMESTEPS), {"beta_start": math.nan}, {"beta_end": math.inf},
        *({"trained_betas": [value] * 1000} for value in (math.nan, 2.0, -0.1)), {"trained_betas": [0.1] * 999},
        {"trained_betas": "betas"}, {"trained_betas": 10**12}, {"beta_end": 2}, {"beta_start": "low"},
        {"beta_schedule": "odd"}, {"prediction_type": "flow_prediction"}, {"prediction_type": []},
        {"timestep_spacing": "odd"}, {"timestep_spacing": None}, {"steps_offset": 10**12}, {"clip_sample": "no"},
    ] for folder in ("pipe", "out")},
}  # fmt: skip


@pytest.mark.parametrize(("name", "words", "change"), [(*key, c) for key, values in CHANGES.items() for c in values])
def test_invalid_values_are_rejected(root, name, words, change):
    assert words in spoiled(root, name, change)


# ---------------------------------------------------------------------- expensive text


def nested_aliases(first, inner):
    """A few lines that expand to 9**11 values. inner: a value with VALUES for nine aliases of the one before."""
    names = "abcdefghijkl"
    lines = (f"{b}: &{b} " + inner.replace("VALUES", ",".join(["*" + a] * 9)) for a, b in zip(names, "bcdefghijklm"))
    return "\n".join([f"a: &a {first}", *lines, ""])


@pytest.mark.parametrize("text", [
    nested_aliases("[x]", "[VALUES]"), nested_aliases("{x: 1}", "{<<: [VALUES]}"), "a: &a [*a]", "a: &a {b: *a}",
    nested_aliases("[x]", "[VALUES]") + "diffusion: {prediction: *m}", "model: &m {num_heads: 2}\ntraining: {<<: *m}",
    "[" * 100_000, "- " * 50_000, "{a: " * 50_000, "a: " + "[" * 60 + "]" * 60, "training: {lr: 1, lr: 2}",
    "? [a]\n: b", "? {a: b}\n: c", "\n".join(f"a{i}: 1" for i in range(3_000)),
    "training: {lr: 1" + ":59" * 300_000 + "}", "training: {lr: 0x" + "f" * 300_000 + "}", "a: 2001-99-99",
    "a: !!bool maybe", "a: !!int ''", "a: !!timestamp x", "a: !!binary ':'", "data: !!set {a, b}",
    "data: {source: !!binary aGVsbG8=}", "data: {source: 2001-01-01}", "labels: {}", "labels: [a]",
    "labels: {names: cat}", "labels: {names: [a, a]}", "%YAML 9.9\n---\na: 1", "a: 1\n---\nb: 2", "\0",
    "a: " + "x" * (5 * 2**20), "data: 3\ndata.source: x", "training: {lr: " + str([[[["x" * 90] * 7] * 7] * 7]) + "}",
], ids=range(34))  # fmt: skip
def test_expensive_or_invalid_yaml(tmp_path, text):
    write(tmp_path / "c.yaml", text)
    assert within_calls(2_000_000, rejection, read_config, tmp_path / "c.yaml")


def test_size_of_yaml_is_limited(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    assert "larger than" in rejected(file, b"a: 1\n" * 2**20, read_config, file)
    assert "no setting 'a0'" in rejected(file, "\n".join(f"a{i}: 1" for i in range(10_000)), read_config, file)
    monkeypatch.setattr("diffusion_adagn.schema.MAX_YAML_VALUES", 1_000)
    write(file, "a: [" + "1," * 10**5 + "]")
    assert "more than 1,000 values" in within_calls(2_000_000, rejection, read_config, file)


@pytest.mark.parametrize("text", [
    "[" * 10**6, '{"a":' * 10**6, '{"a": ' + "9" * 5000 + "}", '"a"', "", f'{{"a": {DEEP_LIST}}}', "\ufeff{}", NESTED,
])  # fmt: skip
def test_expensive_or_invalid_json(root, tmp_path, text):
    assert rejected(tmp_path / "a.json", text, read_document, tmp_path / "a.json") or text == NESTED
    for name in (INDEX, UNET, SCHEDULER):
        assert spoiled(root, f"pipe/{name}", text) or text == NESTED


# ---------------------------------------------------------------------- classes and names


def test_invalid_label_spaces():
    for change in (
        {"names": ["a", "a"]}, {"names": [""]}, {"names": ["\x07"]}, {"names": "abc"}, {"names": [None]},
        {"names": [["a"]]}, {"names": [True]}, {"names": ["x" * (MAX_NAME_CHARS + 1)]}, {"names": ["same"] * 10**5},
        {"original_ids": [1]}, {"original_ids": [1, 2, "x"]}, {"original_ids": [1, 2, math.nan]}, {"wnids": [1, 2, 3]},
        {"wnids": {"a": 1}}, {"has_null": "false"}, {"has_null": None},
    ):  # fmt: skip
        assert rejection(LabelSpace.from_dict, LABELS.to_dict() | change)
    for names, words in ((list(range(MAX_CLASSES + 1)), "at most"), (["a", "a"], "must be unique")):
        assert words in rejection(LabelSpace.from_dict, names)
    for labels in (None, [], "names", {}, 3):
        assert "not a label space" in rejection(LabelSpace.from_dict, labels)


def test_class_names_are_printable():
    space = LabelSpace(("\x1b[2Jcat\x07", "\ud800dog", "می\u200cخواهم"))
    assert space.names == ("[2Jcat", "?dog", "می\u200cخواهم")
    assert LabelSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    "".join(space.names).encode()


def test_long_class_lists_are_fast():
    many = LabelSpace(tuple(f"class {i}" for i in range(1000)))
    assert len(within_calls(200_000, many.parse, "class 7," * 3000)) == 3000
    texts = ("9" * 5000, "id:" + "9" * 5000, "-" + "9" * 5000, "," * 10**5, "x" * 10**5)
    for classes in (*texts, 10**30, -1, {"a": 1}, [[1]], [math.nan]):
        assert within_calls(1_000_000, rejection, many.parse, classes)


def test_incomplete_run_config_is_rejected(root):
    for section, name in (("data", "image_size"), ("data", "channels"), (None, "labels")):
        config = to_dict(CONFIG)
        (config[section] if section else config).pop(name)
        assert name in spoiled(root, "run/config.yaml", json.dumps(config))


ODD_NAMES = ["..", ".", "", "/", "../../outside", "/etc/passwd", "a/../b", "a\\b", "\0", "\ud800", "a\nb", "\x1b[2J"]
ODD_NAMES += ["x" * 3000]
ENTRIES = [[{"file": n}] for n in [*ODD_NAMES, "../samples.json", "notes.txt", None, 3, [], {}]]
ENTRIES = [json.dumps(entry) for entry in [*ENTRIES, None, 3, "ab", {"a": 1}, [[]], [None], [{}]]] + [DEEP_LIST]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_manifest_names_stay_in_folder(tmp_path, name):
    (tmp_path / "run/step-00000009").mkdir(parents=True)
    write(tmp_path / "outside", "secret")
    write(tmp_path / "run/step-00000009/manifest.json", {name: {"bytes": 6, "sha256": "0"}})
    wrong = verify(tmp_path / "run/step-00000009")
    assert "not a file of a checkpoint" in wrong and len(wrong) < 300 and wrong.isprintable()


def test_invalid_manifests_and_states(tmp_path):
    checkpoint, weights = tmp_path / "step-00000009", "model.safetensors"
    checkpoint.mkdir()
    assert "missing" in rejection(read_state, checkpoint)
    write(checkpoint / weights, b"")
    odd = [{weights: v} for v in ODD_VALUES] + [{weights: {"bytes": v}} for v in ODD_VALUES] + ODD_VALUES
    for content in [*map(json.dumps, odd), DEEP_LIST, "[" * 10**6, '{"a":' * 10**6, "", "\0"]:
        for name in ("manifest.json", "state.json"):
            write(checkpoint / name, content)
        assert 10 < len(verify(checkpoint)) < 500
        assert "corrupted" in rejection(load_weights, checkpoint / weights, None)
        assert "corrupted" in rejection(read_state, checkpoint)
    for step in (None, "9", -1, True, 1.5, [9], {}):
        state = {"step": step, "data_fingerprint": "x", "scaler": None}
        assert "step: " in rejected(checkpoint / "state.json", state, read_state, checkpoint)


@pytest.mark.parametrize("entries", ENTRIES, ids=range(len(ENTRIES)))
def test_overwrite_rejects_foreign_files(samples, entries):
    write(samples.parent / "outside", "mine")
    write(samples / "notes.txt", "mine")
    write(samples / "samples.json", f'{{"images": {entries}}}')
    before = sorted(samples.parent.rglob("*"))
    assert ("not valid" if entries == DEEP_LIST else "is corrupted") in rejection(_clear, samples, True)
    assert sorted(samples.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["1.png", "grid.png", "samples-g2.npz"])
def test_overwrite_rejects_folders(samples, name):
    (samples / name).unlink(missing_ok=True)
    (samples / name).mkdir()
    before = sorted(samples.iterdir())
    assert f"{name} is a folder" in rejection(_clear, samples, True)
    assert sorted(samples.iterdir()) == before


def test_overwrite_ignores_missing_files_and_links(samples):
    write(samples.parent / "outside", "mine")
    for name in ("0.png", "1.png"):
        (samples / name).unlink()
    (samples / "1.png").symlink_to(samples.parent / "outside")
    assert rejection(_clear, samples, True) is None and not list(samples.iterdir())
    assert (samples.parent / "outside").read_text() == "mine"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_own_schedulers_are_read(pipe, sampler):
    scheduler = make_scheduler(DiffusionConfig(schedule="cosine", prediction="v", zero_snr=sampler != "heun"), sampler)
    scheduler.save_pretrained(pipe / "scheduler")
    change_json(pipe / INDEX, scheduler=["diffusers", type(scheduler).__name__])
    again = from_pipe(pipe).scheduler
    assert type(again) is type(scheduler) and torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    config, expected = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (again, scheduler))
    assert config == expected


def test_huge_solver_order_is_rejected(root, pipe):
    make_scheduler(DiffusionConfig(), "dpm++").save_pretrained(pipe / "scheduler")
    change_json(pipe / INDEX, scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    assert "solver_order" in spoiled(root, f"pipe/{SCHEDULER}", {"solver_order": 10**10})


def test_failed_import_writes_nothing(root, tmp_path):
    assert spoiled(root, f"out/{UNET}", {"layers_per_block": 10**9}, lambda f: import_diffusers(f, tmp_path / "import"))
    assert not list(tmp_path.glob("*import*"))
