"""adagn completion."""

import subprocess

import pytest

from diffusion_adagn.cli.main import COMMANDS, main

pytest.importorskip("shtab", reason="pip install shtab")


def test_bash_completes_commands_and_options(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "complete.bash").write_text(capsys.readouterr().out)
    code = """
    source complete.bash
    function words { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_adagn; echo "${COMPREPLY[@]}"; }
    words adagn ""
    words adagn sample --guidance_s
    words adagn evaluate digits --extr
    """
    run = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    commands, option, extractor = run.stdout.splitlines()
    assert set(COMMANDS) <= set(commands.split())
    assert option == "--guidance_schedule" and extractor == "--extractor"


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "adagn" in capsys.readouterr().out
