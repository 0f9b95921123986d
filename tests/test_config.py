import dataclasses

import pytest
import yaml

from diffusion_adagn.config import RunConfig, decisive, differences, read_config, to_dict, to_yaml
from diffusion_adagn.errors import InputError, UsageError
from diffusion_adagn.schema import fields_of


def write(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return file


def test_command_line_overrides_the_file(tmp_path):
    file = write(tmp_path, "training: {lr: 1e-4, batch_size: 8}\nmodel: {channel_mult: [1, 2, 4]}\n")
    config = read_config(file, {"training.batch_size": "16", "data.classes": "3"})
    assert config.training.lr == 1e-4  # a string to PyYAML
    assert config.training.batch_size == 16
    assert config.model.channel_mult == (1, 2, 4)
    assert config.data.classes == "3"


def test_configs_round_trip(tmp_path):
    config = read_config(None, {"training.lr": "3e-5", "model.channel_mult": "1,2,2", "data.channels": "1"})
    assert read_config(write(tmp_path, to_yaml(config))) == config
    assert to_dict(config) == yaml.safe_load(to_yaml(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rate: 1}", r"'training.learning_rate' \(in .*c.yaml\)"),
        ("training: {max_step: 1}", "training.max_steps"),
        ("model: {lr: 1}", "training.lr"),
        ("training: {lr: fast}", "training.lr: expected a number, got 'fast'"),
        ("training: {max_steps: 1.5}", "expected a whole number"),
        ("training: {max_steps: true}", "expected a whole number"),
        ("training: {lr: .nan}", "expected a number"),
        ("training: {batch_size: 0}", "at least 1"),
        ("speed: {precision: fp8}", "fp32, bf16, fp16, tf32"),
        ("data: {flip: maybe}", "true or false"),
        ("data: {source: no}", "quote it"),
        ("model: {channel_mult: [1, x]}", "expected a number, got 'x'"),
        ("model: {num_res_blocks: 1.5}", "whole number"),
        ("model: {channel_mult: []}", "channel_mult: needs at least 1 value"),
        ("- a", "sections"),
        ("a: [", "not valid YAML"),
        ("training: 3", "is a section"),
        ("training: {lr: 1, lr: 2}", "duplicate key 'lr'"),
        ("data: {}\ntraining: {}\ndata: {}", "duplicate key 'data'.*line 3"),
        ("model: {attention_resolutions: [-4]}", "at least 1"),
        ("model: {attention_resolutions: [4, 4]}", "attention_resolutions: names a value twice"),
        ("model: {norm_eps: 0}", "norm_eps: must be above 0"),
        ("model: {conditioning: foo}", "model.conditioning: expected adagn, adagn_zero,"),
        ("model: {channel_mult: '1,,2'}", "channel_mult: expected a number, got ''"),
        ("data: {channels: true}", "data.channels: expected 1, 3, got 'True'"),
        ("data: {classes: []}", "data.classes: expected a word"),
        ("output_dir: ''", "output_dir: expected a word"),
        ("output_dir: 2001-01-01", "2001-01-01: YAML reads it as a date, so quote it"),
        ("init_from: ''", "init_from: expected a word"),
        ("training: {max_steps: 010}", "010, which YAML reads in base 8.* line 1"),
        ("training: {max_steps: 1:30}", "1:30, which YAML reads in base 8 or 60"),
        ("training: {seed: 99999999999999999999999}", "must be at most 9223372036854775807"),
    ],
)
def test_file_errors_name_the_key(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_config(write(tmp_path, text))
    assert not isinstance(caught.value, UsageError)


def test_command_line_errors_are_usage_errors():
    with pytest.raises(UsageError, match="command line"):
        read_config(None, {"training.lr": "fast"})
    with pytest.raises(UsageError, match=r"Did you mean training\.lr"):
        read_config(None, {"training.lrr": "1"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"diffusion.zero_snr": "true"}, "prediction to v or x0"),
        ({"diffusion.zero_snr": "true", "diffusion.prediction": "v", "diffusion.loss_weight": "min_snr"}, "uniform"),
        (
            {"diffusion.zero_snr": "true", "diffusion.prediction": "v", "diffusion.timestep_spacing": "leading"},
            "trailing",
        ),
        ({"model.null_class": "false"}, "label_dropout"),
        ({"training.ema_lengths": "0.05,0.05"}, "a length twice"),
    ],
)
def test_contradicting_settings_are_rejected(overrides, message):
    with pytest.raises(InputError, match=message):
        read_config(None, overrides)


@pytest.mark.parametrize("number", ["1e3", "1000.0", "1_000", "+1000", 1000.0])
def test_whole_numbers_in_every_spelling(tmp_path, number):
    assert read_config(None, {"training.max_steps": number}).training.max_steps == 1000
    assert read_config(write(tmp_path, f"training: {{max_steps: {number}}}")).training.max_steps == 1000


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_named(tmp_path, encoding):
    (tmp_path / "c.yaml").write_text("output_dir: runs/caf\u00e9", encoding=encoding)
    with pytest.raises(InputError, match="save it as UTF-8"):
        read_config(tmp_path / "c.yaml")


def test_missing_file_lists_neighbours(tmp_path):
    write(tmp_path, "")
    with pytest.raises(InputError, match=r"c\.yaml"):
        read_config(tmp_path / "d.yaml")


def test_every_field_is_documented():
    for setting in fields_of(RunConfig):
        key = setting.key
        assert len(setting.info.description) > 10, key


def test_differences_name_decisive_settings():
    a = read_config(None, {"training.max_steps": "10"})
    b = read_config(None, {"training.max_steps": "20", "training.lr": "1", "training.log_every": "3"})
    assert differences(decisive(a), b) == ["training.lr: 0.0001 -> 1.0"]
    assert differences(decisive(a), dataclasses.replace(a)) == []
