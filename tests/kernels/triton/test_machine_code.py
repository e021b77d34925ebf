"""What `machine_code` reads from the output of compilers."""

import pytest

from softprompt_kernels.kernels.triton.compile.machine_code import Dot, amd, dots, expected_instruction, nvidia

USAGE = " Function mm:\n  REG:108 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0"
PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_first.v2.b64 {%rd2, %rd3}, [%rd1];
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
    cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 16, %r2;
    cp.async.commit_group;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 0;
    st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
    atom.global.gpu.acq_rel.add.f32 %r1, [ %rd1 + 0 ], %r2;
    red.relaxed.gpu.global.add.f32 [%rd1], %r2;
"""
GFX = """
    buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
    buffer_store_short v0, v4, s[0:3], 0 offen
    v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
    .agpr_count:     0
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 2
    .vgpr_count:     92
    .vgpr_spill_count: 3
"""
TTIR = """
  %s = tt.dot %q, %k, %z, inputPrecision = tf32 : tensor<64x32xf32> * tensor<32x16xf32> -> tensor<64x16xf32> loc(#l)
  %o = tt.dot %p, %v, %a : tensor<16x16xbf16> * tensor<16x64xbf16> -> tensor<16x64xf32> loc(#l)
"""


def test_nvidia_reads_resource_usage_and_instructions() -> None:
    code = nvidia(USAGE, PTX)
    assert (code.registers, code.stack, code.spilled) == (108, 24, 0)
    assert code.matrix == ("wgmma",) and code.copies == ("cp.async",)
    assert code.load_bytes == (2, 16) and code.store_bytes == (16,)
    assert code.atomics == 2


def test_tma_is_distinguished_from_other_asynchronous_copies() -> None:
    tma = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [a], [b, {c, d}], [e];"
    assert nvidia(USAGE, tma).copies == ("TMA",)
    assert nvidia(USAGE, "cp.async.wait_group 0x1;").copies == ()


def test_amd_reads_metadata_and_instructions() -> None:
    code = amd(GFX)
    assert (code.registers, code.stack, code.spilled, code.scalars) == (92, 12, 3, 2)
    assert code.matrix == ("mfma",)
    assert code.load_bytes == (16,) and code.store_bytes == (2,)


def test_a_report_without_numbers_is_an_error_and_not_zero() -> None:
    with pytest.raises(ValueError, match="REG"):
        nvidia("cuobjdump fatal : no input", PTX)


def test_dots_are_read_with_shapes_and_precision() -> None:
    assert dots(TTIR) == [Dot(64, 32, 16, "f32", "tf32"), Dot(16, 16, 64, "bf16", "ieee")]


@pytest.mark.parametrize(
    ("dot", "target", "warps", "instruction"),
    [
        (Dot(64, 64, 64, "bf16", "ieee"), "sm_90", 4, "wgmma"),
        (Dot(64, 64, 64, "bf16", "ieee"), "sm_90", 2, "mma.sync"),  # not a warp group
        (Dot(16, 64, 64, "bf16", "ieee"), "sm_90", 4, "mma.sync"),  # too few rows
        (Dot(64, 64, 64, "bf16", "ieee"), "sm_100", 4, "tcgen05"),
        (Dot(64, 64, 64, "f16", "ieee"), "sm_120", 4, "mma.sync"),
        (Dot(64, 64, 64, "f16", "ieee"), "sm_80", 4, "mma.sync"),
        (Dot(64, 64, 64, "f32", "tf32"), "sm_90", 4, "mma.sync"),
        (Dot(64, 64, 64, "f32", "ieee"), "sm_90", 4, None),
        (Dot(64, 64, 64, "f32", "ieee"), "gfx942", 4, "mfma"),
    ],
)
def test_the_best_instruction_of_each_chip_is_expected(
    dot: Dot, target: str, warps: int, instruction: str | None
) -> None:
    assert expected_instruction([dot], target, warps) == instruction


def test_a_kernel_without_dots_needs_no_matrix_instruction() -> None:
    assert expected_instruction([], "sm_90", 8) is None and expected_instruction([], "gfx942", 8) is None
