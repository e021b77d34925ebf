"""The entry point: unknown commands, the help page, and what it imports."""

import subprocess
import sys


def test_an_unknown_command_gets_a_suggestion(tmp_path):
    program = "import sys; from softprompt_kernels.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program]
    result = subprocess.run([*command, "compres"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "Did you mean 'compress'" in " ".join(result.stderr.split())


def test_help_names_every_command(run):
    text = run("--help").stdout
    for name in ("compress", "generate", "evaluate", "doctor"):
        assert f" {name} " in text


def test_help_and_errors_in_options_do_not_import_torch(tmp_path):
    program = (
        "import sys\nfrom softprompt_kernels.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for arguments, code in ((["compress", "--help"], 0), (["compress", "--tokens", "0"], 2)):
        command = [sys.executable, "-c", program, *arguments]
        assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == code
