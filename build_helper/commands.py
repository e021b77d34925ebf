"""The setuptools commands: compile with ninja, and pack only what this build made."""

import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.install_lib import install_lib

from build_helper.modules import MODULES
from build_helper.ninja import ninja_file
from build_helper.plans import CSRC

OLDEST_SETUPTOOLS = 77  # the first that reads the license in pyproject.toml


def check_setuptools() -> None:
    """Exits with a message if setuptools is too old for pyproject.toml, where it would show a traceback."""
    version = setuptools.__version__
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        sys.exit(
            f"softprompt-kernels: setuptools is {version}, accepted is {OLDEST_SETUPTOOLS} or newer "
            f"(pip install 'setuptools>={OLDEST_SETUPTOOLS}')"
        )


class BuildModules(build_ext):
    """Compiles several sources at a time, and only what has changed since the last build."""

    def build_extension(self, ext: Extension) -> None:
        """Writes a build.ninja and runs it. A module that does not compile is left out, unless its variable is 1."""
        module = next(module for module in MODULES if module.name == ext.name)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, *ext.name.split(".")[-2:]).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "build.ninja").write_text(ninja_file(module.plan(), CSRC, target))
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            failed = f"softprompt-kernels: the {module.content} did not compile ({error})"
            if module.choice == "1":
                sys.exit(f"{failed}; {module.advice}")
            print(f"{failed}. They are left out; {module.variable}=1 makes this an error.", file=sys.stderr)
            target.unlink(missing_ok=True)  # an earlier build may have made it
            ext.optional = True  # else setuptools fails when it copies the missing file


class InstallBuiltFiles(install_lib):
    """Packs what this build made, and nothing else from the build folder, which earlier builds have used too.

    Such files are the module for tests after a build with SOFTPROMPT_SIMT=1, the compiled kernels where this build does
    not want them, and modules of Python that have been renamed.
    """

    def install(self) -> list[str]:
        """Copies the files and gives their new paths."""
        copied = []
        for file in self.built_files():
            source, target = Path(self.build_dir, file), Path(self.install_dir, file)
            if source.is_file():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))
                copied.append(str(target))
        return copied

    def built_files(self) -> list[str]:
        """The outputs of this build's build_py and build_ext, relative to the build folder."""
        build_py, build = self.get_finalized_command("build_py"), self.get_finalized_command("build_ext")
        assert isinstance(build, build_ext)
        python = build_py.get_outputs(include_bytecode=False) if self.distribution.has_pure_modules() else []
        files = {str(Path(file).relative_to(build_py.build_lib)) for file in python}
        return sorted(files | {build.get_ext_filename(ext.name) for ext in self.distribution.ext_modules or ()})
