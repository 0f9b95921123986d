"""Recipes by name: in every command with a config, from any folder, and in the wheel."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, one_line

from diffusion_adagn import recipes
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import read_config
from diffusion_adagn.errors import InputError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _other_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_recipes_are_found_from_any_folder():
    assert recipes.names() == [file.stem for file in CONFIGS]
    for file in CONFIGS:
        assert read_config(file.stem) == read_config(file)


@pytest.mark.parametrize(
    "given", [["digits"], ["--config", "digits"], ["--config=digits"], ["digits", "--config", "digits"]]
)
def test_train_accepts_recipe_names(given, step_time, capsys):
    assert main(["train", "--dry_run", "--verbose", "--training.max_steps", "7", *given]) == 0
    printed = capsys.readouterr().out
    assert "max_steps: 7" in printed and "output_dir: runs/digits" in printed


def test_ablate_accepts_both_forms(capsys):
    for given in (["digits"], ["--config", "digits"]):
        assert main(["ablate", *given, "--kinds", "adagn", "--seeds", "0", "--dry_run"]) == 0
        assert "runs/ablation-digits/adagn-seed0" in capsys.readouterr().out
    assert main(["ablate", "--seeds", "0"]) == 2
    assert "adagn ablate digits" in capsys.readouterr().err


def test_inspect_accepts_recipe_names(capsys):
    assert main(["data", "inspect", "--count", "1", "--config", "digits"]) == 0
    assert "digits:train" in capsys.readouterr().out


def test_existing_file_takes_precedence(tmp_path, capsys):
    (tmp_path / "digits").write_text("training: {max_steps: 3}\noutput_dir: mine\n")
    assert read_config("digits").output_dir == "mine"
    assert main(["train"]) == 2
    recipe_file = capsys.readouterr().err.splitlines()[-1].split()[-1]  # so the printed command names the recipe's file
    assert read_config(recipe_file).output_dir == "runs/digits"


def test_folder_does_not_hide_recipes(tmp_path):
    (tmp_path / "digits").mkdir()
    assert read_config("digits").output_dir == "runs/digits"


def test_two_configs_are_rejected(capsys):
    for command in ("train", "ablate"):
        assert main([command, "digits", "--config", "cifar10"]) == 2
        assert "digits and --config cifar10" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["train", "digit"], ["train", "--config", "configs/digits.yml"], ["init", "digts"]])
def test_unknown_recipes_get_suggestions(argv, capsys):
    assert main(argv) == 1
    message = one_line(capsys.readouterr().err)
    assert "Did you mean digits?" in message
    assert all(name in message for name in recipes.names())


def test_run_folder_suggests_its_config(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("output_dir: run\n")
    with pytest.raises(InputError, match=r"run/config\.yaml"):
        read_config("run")


def test_init_prints_the_exact_file(capsys):
    for file in CONFIGS:
        assert main(["init", file.stem]) == 0
        printed = capsys.readouterr().out
        schema = re.search(r"\$schema=(.*)", printed)[1]
        assert Path(schema).is_file()  # an absolute path, for editors of a copy
        assert printed.replace(schema, "run.schema.json") == file.read_text(encoding="utf-8")


def test_init_lists_recipes_with_headers(capsys):
    assert main(["init"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for file in CONFIGS:
        header = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert any(line.split()[:1] == [file.stem] and line.endswith(header) for line in lines)


def test_init_needs_no_torch():
    code = "import sys; from diffusion_adagn.cli.main import main; main(['init', 'digits']); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("# scikit-learn's"), done.stderr


def test_config_may_follow_options(step_time, capsys):
    assert main(["train", "--dry_run", "--output_dir", "runs/x", "digits"]) == 0
    assert main(["data", "inspect", "--count", "1", "digits"]) == 0
    assert main(["train", "digits", "cifar10"]) == 2
    assert "does not know 'cifar10'" in capsys.readouterr().err


# ---------------------------------------------------------------------- what is installed


def _tree(folder):
    """A copy of the project, since a build writes into it."""
    made = ("runs", "samples", "sweeps", "evaluations", "references", "traces", "wandb", "build", "dist")
    everywhere = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "*.egg-info", "__pycache__", "results"
    )

    def skip(where, names):  # the package has a folder runs too
        return everywhere(where, names) | {name for name in names if name in made and Path(where) == ROOT}

    return shutil.copytree(ROOT, folder, ignore=skip)


def _build(tree, what, out):
    """`build_sdist` or `build_wheel` of the project in `tree`, by the installed setuptools. Returns the file."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"import sys; from setuptools import build_meta; print(build_meta.{what}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def test_package_data_includes_every_recipe(tmp_path, monkeypatch):
    """What setup.py passes to setuptools, without a build."""
    pytest.importorskip("setuptools")
    from distutils.core import run_setup

    monkeypatch.chdir(ROOT)
    distribution = run_setup("setup.py", stop_after="init")
    assert distribution.package_dir["diffusion_adagn.configs"] == "configs"
    patterns = distribution.package_data["diffusion_adagn.configs"]
    mapped = {file for pattern in patterns for file in (ROOT / "configs").glob(pattern)}
    assert mapped == {file for file in (ROOT / "configs").iterdir() if file.is_file()}
    patterns = distribution.package_data["diffusion_adagn"]
    packed = {file for pattern in patterns for file in (ROOT / "diffusion_adagn").glob(pattern)}
    assert packed >= {file for file in (ROOT / "diffusion_adagn/pretrained").rglob("*") if file.is_file()}
    folders = {
        str(f.parent.relative_to(ROOT)).replace("/", ".") for f in (ROOT / "diffusion_adagn").rglob("__init__.py")
    }
    assert folders | {"diffusion_adagn.configs"} == set(distribution.packages)


@pytest.mark.slow
@pytest.mark.serial
def test_wheel_trains_by_recipe_name(tmp_path):
    """Build an sdist and a wheel, install it into a separate folder, use it in an empty one."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    sdist = _build(_tree(tmp_path / "tree"), "build_sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [source] = (tmp_path / "unpacked").iterdir()
    wheel = _build(source, "build_wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        for file in CONFIGS:
            assert archive.read(f"diffusion_adagn/configs/{file.name}") == file.read_bytes()
        assert {"diffusion_adagn/data/imagenet_classes.tsv", "diffusion_adagn/ops/adagn_silu.cpp"} <= set(
            archive.namelist()
        )
        for file in (ROOT / "diffusion_adagn/pretrained").rglob("*.*"):
            assert archive.read(str(file.relative_to(ROOT))) == file.read_bytes()
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, capture_output=True)

    def adagn(*argv):
        code = "import diffusion_adagn, sys; assert diffusion_adagn.__file__.startswith(sys.argv.pop(1)); "
        code += "from diffusion_adagn.cli.main import console; console()"
        done = subprocess.run(
            [sys.executable, "-c", code, str(site), *argv],
            capture_output=True,
            text=True,
            cwd=empty,
            env=os.environ | {"PYTHONPATH": str(site)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    schema = site / "diffusion_adagn/configs/run.schema.json"
    assert schema.is_file()  # `init` writes to any folder, so its file names the installed schema
    text = (ROOT / "configs/digits.yaml").read_text().replace("$schema=run.schema.json", f"$schema={schema}")
    assert adagn("init", "digits") == text
    assert "adagn train digits" in adagn("--help")
    for argv in (["--config", "digits"], ["digits"]):
        assert "output_dir: runs/digits" in adagn("train", *argv, "--dry_run", "--verbose")
    assert "samples/pretrained/digits" in adagn("sample", "digits", "--classes", "3", "--count", "1", "--steps", "2")
    assert adagn("data", "inspect", "digits").endswith("  adagn train --config digits --dry_run\n")


@pytest.mark.slow
@pytest.mark.serial
def test_sdist_contains_every_file(tmp_path):
    pytest.importorskip("setuptools")
    tree = _tree(tmp_path / "tree")
    files = {str(f.relative_to(tree)) for f in tree.rglob("*") if f.is_file()}
    with tarfile.open(_build(tree, "build_sdist", tmp_path / "sdist")) as archive:
        packed = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    assert files - packed == set()


@pytest.mark.slow
@pytest.mark.serial
def test_editable_install_finds_recipes(tmp_path):
    pytest.importorskip("setuptools")
    tree = _tree(tmp_path / "tree")
    wheel = _build(tree, "build_editable", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (  # without the environment's site-packages, which may contain another editable install
        "import site, sys; site.addsitedir(sys.argv[1]); sys.path.append(sys.argv[2]); from diffusion_adagn import "
        "recipes; "
        "print(recipes.folder(), *recipes.names())"
    )
    (tmp_path / "empty").mkdir()
    argv = [sys.executable, "-S", "-P", "-c", code, str(tmp_path / "site"), str(Path(yaml.__file__).parents[1])]
    done = subprocess.run(argv, cwd=tmp_path / "empty", env={}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(tree / "configs"), *(file.stem for file in CONFIGS)], done.stderr
