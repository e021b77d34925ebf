"""Which source is compiled with which options."""

import re
import shlex
import sys

import pytest

from build_helper import compilers, plans


@pytest.fixture(autouse=True)
def platform(monkeypatch):
    """Linux on x86-64 with a GCC that knows AMX, unless a test says otherwise."""

    def pretend(system="linux", machine="x86_64", clang=False):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(compilers.platform, "machine", lambda: machine)
        monkeypatch.setattr(compilers, "is_clang", lambda: clang)

    monkeypatch.setattr(compilers, "has_amx", lambda flags: sys.platform == "linux")
    monkeypatch.setenv("CXX", "c++")
    pretend()
    return pretend


def objects(plan):
    return {(unit.folder, unit.source): unit.options.split() for unit in plan.units}


def all_sources(folder, *endings):
    return {
        file.relative_to(plans.CSRC).as_posix()
        for ending in endings
        for file in (plans.CSRC / folder).rglob(f"*.{ending}")
    }


def test_the_cpu_plan_compiles_every_source_of_the_cpu_kernels():
    sources = {unit.source for unit in plans.cpu_plan().units}
    assert all_sources("cpu", "cpp") <= sources
    assert {source for source in sources if source.startswith("bindings/")} == {
        source for source in all_sources("bindings", "cpp") if "/cpu" in source
    }


def test_every_source_exists_and_no_object_is_made_twice():
    for plan in (plans.cpu_plan(), plans.cuda_plan(), plans.simt_plan()):
        assert plan.units
        assert all((plans.CSRC / unit.source).is_file() for unit in plan.units)
        assert len({(unit.folder, unit.source) for unit in plan.units}) == len(plan.units)
        assert {unit.rule for unit in plan.units} <= plan.rules.keys()


def test_every_macro_that_a_plan_defines_is_read_by_a_source(monkeypatch):
    monkeypatch.setenv("NVCC", "nvcc")
    endings = ("h", "cpp", "cu", "cuh")
    text = "".join((plans.CSRC / source).read_text(encoding="utf-8") for source in all_sources("", *endings))
    for plan in (plans.cpu_plan(), plans.cuda_plan(), plans.simt_plan()):
        commands = " ".join([*plan.rules.values(), *(unit.options for unit in plan.units)])
        for macro in set(re.findall(r"-D(SPK_\w+)", commands)) - {"SPK_HAS_BASELINE"}:  # every machine has this one
            assert re.search(rf"\b{macro}\b", text), macro


def test_a_kernel_is_compiled_once_for_each_instruction_set():
    made = objects(plans.cpu_plan())
    for source in plans.CPU_FOR_EACH_INSTRUCTION_SET:
        for name, flags in compilers.INSTRUCTION_SETS["x86_64"].items():
            assert made[name, source][: len(flags.split())] == flags.split()
            assert f"-DSPK_ISA={name}" in made[name, source]
        assert ("neutral", source) not in made


def test_only_the_gemm_of_an_instruction_set_is_compiled_for_it():
    made = objects(plans.cpu_plan())
    assert [key for key in made if "gemm/gemm_" in key[1]] == [
        ("amx", "cpu/gemm/gemm_amx.cpp"),
        ("avx512", "cpu/gemm/gemm_avx512.cpp"),
    ]


@pytest.mark.parametrize(
    ("system", "machine", "sets"),
    [
        ("linux", "x86_64", {"amx", "avx512", "avx2", "baseline"}),
        ("darwin", "x86_64", {"avx512", "avx2", "baseline"}),
        ("linux", "aarch64", {"baseline"}),
        ("darwin", "arm64", {"baseline"}),
    ],
)
def test_common_code_knows_the_instruction_sets_that_were_built(platform, system, machine, sets):
    platform(system, machine)
    plan = plans.cpu_plan()
    command = shlex.split(plan.rules["compile"])
    assert {word for word in command if word.startswith("-DSPK_HAS_")} == {f"-DSPK_HAS_{name.upper()}" for name in sets}
    assert {unit.folder for unit in plan.units} == {"neutral", *sets}


@pytest.mark.parametrize(
    ("system", "flags"), [("linux", ["-shared"]), ("darwin", ["-bundle", "-undefined", "dynamic_lookup"])]
)
def test_how_a_module_is_linked(platform, system, flags):
    platform(system)
    link = shlex.split(plans.cpu_plan().rules["link"])
    assert [word for word in link if word in ("-shared", "-bundle", "-undefined", "dynamic_lookup")] == flags


@pytest.mark.parametrize("clang", [True, False])
def test_openmp_is_for_gcc(platform, clang):
    platform(clang=clang)
    assert ("-fopenmp" in plans.cpu_plan().rules["compile"].split()) is not clang


def test_flags_of_the_environment_come_after_ours(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    monkeypatch.setenv("CXXFLAGS", "-O1 -DA='$b'")
    monkeypatch.setenv("LDFLAGS", "-Wl,-rpath,$ORIGIN")
    rules = plans.cpu_plan().rules
    assert rules["compile"].startswith("ccache g++ ") and rules["link"].startswith("ccache g++ ")
    assert rules["compile"].index("-O3") < rules["compile"].index("-O1 -DA='$$b'")
    assert "-Wl,-rpath,$$ORIGIN" in rules["link"]


def test_a_folder_with_a_space_and_a_dollar_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(plans, "CSRC", tmp_path / "a $in" / "csrc")
    assert f"-I'{tmp_path}/a $$in/csrc'" in plans.compile_cxx("")


@pytest.mark.parametrize(
    ("given", "archs"),
    [
        (None, ["80", "86", "89", "90", "100", "120"]),
        ("", ["80", "86", "89", "90", "100", "120"]),
        ("90", ["90"]),
        ("120; 90,100;90", ["90", "100", "120"]),
    ],
)
def test_architectures(monkeypatch, given, archs):
    if given is not None:
        monkeypatch.setenv("SOFTPROMPT_CUDA_ARCHS", given)
    assert plans.cuda_archs() == archs


@pytest.mark.parametrize("given", ["75", "sm_90", "90a", ";", "90;;100", "8.0"])
def test_architectures_that_are_refused(monkeypatch, given):
    monkeypatch.setenv("SOFTPROMPT_CUDA_ARCHS", given)
    with pytest.raises(SystemExit, match="SOFTPROMPT_CUDA_ARCHS must be numbers from 80 up"):
        plans.cuda_archs()


def test_cuda_code_for_each_architecture_and_ptx_for_later_ones(monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CUDA_ARCHS", "90;80")
    monkeypatch.setenv("NVCC", "nvcc")
    rules = plans.cuda_plan().rules
    command = shlex.split(rules["compile"])
    assert [command[i + 1] for i, word in enumerate(command) if word == "-gencode"] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]
    assert '-DSPK_CUDA_ARCHS="80;90"' in command
    assert "-gencode" not in rules["bind"]
    assert {unit.source for unit in plans.cuda_plan().units if unit.rule == "compile"} == all_sources("cuda", "cu")


def test_nvcc_uses_cxx_for_host_code_only_if_it_is_set(monkeypatch):
    monkeypatch.setenv("CXX", "/opt/my g++")
    command = shlex.split(plans.cuda_plan().rules["compile"])
    assert command[command.index("-ccbin") + 1] == "/opt/my g++"
    monkeypatch.delenv("CXX")
    assert "-ccbin" not in plans.cuda_plan().rules["compile"]


def test_simt_instruments_the_kernels_and_not_its_own_runtime():
    plan = plans.simt_plan()
    assert {unit.folder for unit in plan.units if "-fsanitize=thread" in unit.options} == {"kernels"}
    assert {unit.source for unit in plan.units if unit.folder == "kernels"} == all_sources("cuda", "cu")
    assert {unit.source for unit in plan.units if unit.folder == "runtime"} == all_sources("simt", "cpp")
    assert "-DSPK_SIMT" in plan.rules["compile"]


def test_simt_under_another_sanitizer_has_no_instrumentation(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-fsanitize=address,undefined")
    assert not any("-fsanitize" in unit.options for unit in plans.simt_plan().units)
