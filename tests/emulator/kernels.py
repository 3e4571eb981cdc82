"""Small PTX kernels that the emulator's own tests run."""

from __future__ import annotations

import numpy as np

from .launcher import launch

HEADER = ".version 8.7\n.target sm_100a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n"

REGISTER = {"b8": "b16", "u8": "b16", "s8": "b16", "bf16": "b16", "f16": "b16", "f16x2": "b32", "bf16x2": "b32",
            "f32x2": "b64", "tf32": "b32"}  # fmt: skip


def kernel(params: int, body: str, registers: str = "", threads: int = 32) -> str:
    """A kernel `k` with 64-bit parameters p0, p1, ...; `%tid` is its thread index in `%t`."""
    listed = ",\n".join(f".param .u64 p{n}" for n in range(params))
    return (f"{HEADER}.visible .entry k(\n{listed}\n)\n.reqntid {threads}\n{{\n"
            f".reg .b32 %t;\n.reg .pred %p<8>;\n.reg .b16 %h<8>;\n.reg .b32 %r<64>;\n.reg .b64 %d<32>;\n{registers}\n"
            f"mov.u32 %t, %tid.x;\n{body}\nret;\n}}\n")  # fmt: skip


def elementwise(instruction: str, types: list[str], output: str, inputs: list[np.ndarray], **options) -> np.ndarray:
    """Runs `instruction` (with `{d}` and `{0}`, `{1}`, ... for registers) once per element.

    types and output: PTX types of the operands, which pick register and element widths. inputs: arrays of those widths.
    """
    size = {"pred": 4}
    n = len(inputs[0])
    names = {}
    lines, registers = [], []
    widths = [a.itemsize for a in inputs]
    for at, width in enumerate(widths):
        reg_type = f"b{max(16, 8 * width)}"
        registers.append(f".reg .{reg_type} %in{at};")
        lines += [f"ld.param.b64 %d{at}, [p{at}];", f"mad.wide.u32 %d{at}, %t, {width}, %d{at};",
                  f"ld.global.b{8 * width} %in{at}, [%d{at}];"]  # fmt: skip
        names[str(at)] = f"%in{at}"
    out_width = size.get(output) or _width(output)
    registers.append(f".reg .b{max(16, 8 * out_width)} %out;" if output != "pred" else ".reg .b32 %out;")
    names["d"] = "%out" if output != "pred" else "%p1"
    text = instruction
    for name, register in names.items():
        text = text.replace("{" + name + "}", register)
    lines.append(text)
    if output == "pred":
        lines.append("selp.b32 %out, 1, 0, %p1;")
    at = len(inputs)
    lines += [f"ld.param.b64 %d{at}, [p{at}];", f"mad.wide.u32 %d{at}, %t, {out_width}, %d{at};",
              f"st.global.b{8 * out_width} [%d{at}], %out;"]  # fmt: skip
    out = np.zeros(n, f"u{out_width}")
    launch(kernel(at + 1, "\n".join(lines), "\n".join(registers), n), 1, n, [*inputs, out], **options)
    return out


def _width(ty: str) -> int:
    from .ptx import TYPE_BYTES

    return TYPE_BYTES[ty]


# One tile through TMA and a tensor core ----------------------------------------------------------------------------

ELEMENT = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1}


class Operand:
    """A matrix operand (rows along M or N, depth along K) brought to shared memory by TMA boxes of the swizzle's
    width.
    """

    def __init__(self, name: str, rows: int, depth: int, size: int, span: int, mn_major: bool, start: int) -> None:
        self.name, self.rows, self.depth, self.size = name, rows, depth, size
        self.span, self.mn_major, self.start = span, mn_major, start
        width = span or 16  # without a swizzle, boxes are one core matrix wide
        inner, outer = (rows, depth) if mn_major else (depth, rows)
        self.box = (min(width // size, inner), outer)
        self.boxes = -(-inner // self.box[0])
        self.box_bytes = self.box[0] * self.box[1] * size

    @property
    def bytes(self) -> int:
        return self.boxes * self.box_bytes

    def loads(self, map_register: str, barrier: str, first: int = 0) -> list[str]:
        return [
            f"mov.b32 %r20, smem; add.s32 %r20, %r20, {self.start + n * self.box_bytes};\n"
            "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r20], "
            f"[{map_register}, {{{first + n * self.box[0]}, 0}}], [{barrier}];"
            for n in range(self.boxes)
        ]

    def descriptor(self, step: int, sm90: bool) -> tuple[int, int]:
        """(byte offset from `smem`, upper bits) of the operand's descriptor for K step `step` of 32 bytes."""
        span = self.span
        if not self.mn_major:
            if span:
                leading, stride = 16, 8 * span
                block, inside = divmod(32 * step, span)
                offset = block * self.box_bytes + inside
            else:
                leading, stride = self.box_bytes, 128
                offset = 2 * step * self.box_bytes
        else:
            group = 8 * (span or 16)
            leading, stride = (self.box_bytes, group) if span else (group, self.box_bytes)
            offset = step * (32 // self.size) // 8 * group
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[span] << 62 if sm90 else {0: 0, 128: 2, 64: 4, 32: 6}[span] << 61
        fixed = mode | (leading >> 4) << 16 | (stride >> 4) << 32
        return self.start + offset, fixed if sm90 else fixed | 1 << 46


def tile_product(
    kind: str, m: int, n: int, k: int, span: int, a_mn: bool, b_mn: bool, *, sm90: bool
) -> tuple[str, Operand, Operand, int]:
    """PTX that multiplies one tile: TMA loads, then tcgen05.mma (or wgmma) over K, then a store of D (m x n float32).

    Returns (ptx, operand A, operand B, dynamic shared bytes). Parameters: map of A, map of B, D.
    """
    size = ELEMENT[kind]
    a = Operand("a", m, k, size, span, a_mn, 1024)
    b = Operand("b", n, k, size, span, b_mn, 1024 + -(-a.bytes // 1024) * 1024)
    end = b.start + -(-b.bytes // 1024) * 1024
    lines = [
        "mov.b32 %r1, smem; add.s32 %r2, %r1, 8; add.s32 %r3, %r1, 16;",
        "setp.eq.u32 %p1, %t, 0;",
        "@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;",
        "@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;",
        "fence.proxy.async.shared::cta;",
        "bar.sync 0;",
        "@!%p1 bra LOADED;",
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {a.bytes + b.bytes};",
        "mov.b64 %d1, p0; mov.b64 %d2, p1;",
        *a.loads("%d1", "%r1"),
        *b.loads("%d2", "%r1"),
        "LOADED:",
        "bar.warp.sync 0xffffffff;",
        "WAIT1: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0;",
        "@!%p2 bra WAIT1;",
    ]
    steps = k * size // 32
    descriptors = [(a.descriptor(s, sm90), b.descriptor(s, sm90)) for s in range(steps)]

    def load_descriptor(register: str, place: tuple[int, int]) -> str:
        offset, fixed = place
        return (
            f"mov.b32 %r21, smem; add.s32 %r21, %r21, {offset}; shr.u32 %r21, %r21, 4; cvt.u64.u32 {register}, %r21; "
            f"or.b64 {register}, {register}, {fixed};"
        )

    lines += (_wgmma_tile(kind, n, a_mn, b_mn, descriptors, load_descriptor) if sm90 else
              _tcgen05_tile(kind, m, n, a_mn, b_mn, descriptors, load_descriptor))  # fmt: skip
    registers = f".reg .b32 %acc<{max(n, 1)}>;"
    params = ".param .align 64 .b8 p0[128],\n.param .align 64 .b8 p1[128],\n.param .u64 p2"
    text = kernel(0, "\n".join(lines), registers, 128).replace(".entry k(\n\n)", f".entry k(\n{params}\n)")
    return text, a, b, end


def _tcgen05_tile(kind, m, n, a_mn, b_mn, descriptors, load_descriptor) -> list[str]:
    columns = max(32, 1 << (n - 1).bit_length())
    family = {"bf16": "f16", "f16": "f16", "tf32": "tf32"}.get(kind, "f8f6f4")
    code = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1}[kind]
    instruction = 1 << 4 | code << 7 | code << 10 | a_mn << 15 | b_mn << 16 | (n // 8) << 17 | (m // 16) << 24
    lines = [
        "setp.lt.u32 %p3, %t, 32;",
        f"@%p3 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], {columns};",
        "bar.sync 0;",
        "ld.shared.b32 %r4, [%r3];",
        f"mov.b32 %r5, {instruction};",
        "@!%p1 bra ISSUED;",
    ]
    for step, (a, b) in enumerate(descriptors):
        lines += [load_descriptor("%d3", a), load_descriptor("%d4", b), f"setp.ne.u32 %p4, {step}, 0;",
                  f"tcgen05.mma.cta_group::1.kind::{family} [%r4], %d3, %d4, %r5, %p4;"]  # fmt: skip
    lines += [
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];",
        "ISSUED: bar.warp.sync 0xffffffff;",
        "WAIT2: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;",
        "@!%p2 bra WAIT2;",
        "ld.param.b64 %d5, [p2];",
        "shr.u32 %r6, %t, 5; shl.b32 %r7, %r6, 21; add.s32 %r8, %r4, %r7; and.b32 %r9, %t, 31;",
    ]
    # M=64 keeps 16 rows in each quarter of the lanes.
    if m == 64:
        lines += ["shl.b32 %r10, %r6, 4; add.s32 %r10, %r10, %r9; setp.lt.u32 %p5, %r9, 16;"]
    else:
        lines += ["mov.b32 %r10, %t; setp.lt.u32 %p5, %t, 128;"]
    lines.append(f"mul.lo.s32 %r11, %r10, {4 * n}; cvt.u64.u32 %d6, %r11; add.s64 %d5, %d5, %d6;")
    for column in range(0, n, 8):
        names = ",".join(f"%acc{c}" for c in range(8))
        lines.append(f"add.s32 %r12, %r8, {column};\ntcgen05.ld.sync.aligned.32x32b.x8.b32 {{{names}}}, [%r12];\n"
                     "tcgen05.wait::ld.sync.aligned;")  # fmt: skip
        lines += [f"@%p5 st.global.b32 [%d5+{4 * (column + c)}], %acc{c};" for c in range(8)]
    lines += ["bar.sync 0;", f"@%p3 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, {columns};"]
    return lines


def _wgmma_tile(kind, n, a_mn, b_mn, descriptors, load_descriptor) -> list[str]:
    depth = 32 // ELEMENT[kind]
    lines = ["wgmma.fence.sync.aligned;"]
    registers = ",".join(f"%acc{c}" for c in range(n // 2))
    majors = f", {int(a_mn)}, {int(b_mn)}" if ELEMENT[kind] == 2 else ""
    for step, (a, b) in enumerate(descriptors):
        lines += [
            load_descriptor("%d3", a),
            load_descriptor("%d4", b),
            f"setp.ne.u32 %p4, {step}, 0;",
            f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} "
            f"{{{registers}}}, %d3, %d4, %p4, 1, 1{majors};",
        ]
    lines += [
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0;",
        "ld.param.b64 %d5, [p2];",
        "shr.u32 %r6, %t, 5; and.b32 %r9, %t, 31; shr.u32 %r10, %r9, 2; "
        "shl.b32 %r11, %r6, 4; add.s32 %r10, %r10, %r11;",
        f"and.b32 %r12, %t, 3; shl.b32 %r12, %r12, 1; mad.lo.s32 %r12, %r10, {n}, %r12; mul.wide.u32 %d6, %r12, 4;",
        "add.s64 %d5, %d5, %d6;",
    ]
    for c in range(n // 2):
        at = 4 * (8 * (c // 4) + c % 2 + 8 * n * (c // 2 % 2))
        lines.append(f"st.global.b32 [%d5+{at}], %acc{c};")
    return lines


def wgmma_from_registers(
    kind: str,
    n: int,
    accumulator: str,
    *,
    fence: str = "wgmma.fence.sync.aligned;",
    wait: str = "wgmma.wait_group.sync.aligned 0;",
    between: str = "",
    scale_a: int = 1,
) -> str:
    """PTX that computes D = scale_a * A B^T + C with A (64 x 32 bytes) in registers: one wgmma of a warpgroup.

    Parameters, all of words a thread: A fragments (4), B as it lies in shared memory (n x 32 bytes, without swizzle:
    columns of 16 bytes, first all rows of the first), C and D fragments. between: put between wgmma and its wait, where
    `%a<4>` are the A registers and `%c<...>` the accumulators.
    """
    registers = n // 2 if accumulator == "f32" else n // 4
    depth = 32 // ELEMENT[kind]
    words = 8 * n  # of B
    lines = [
        "ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 16, %d1; ld.global.v4.b32 {%a0,%a1,%a2,%a3}, [%d1];",
        f"ld.param.b64 %d3, [p2]; mad.wide.u32 %d3, %t, {4 * registers}, %d3;",
        *[f"ld.global.b32 %c{r}, [%d3+{4 * r}];" for r in range(registers)],
        "ld.param.b64 %d2, [p1]; mov.b32 %r1, smem; mov.b32 %r2, %t;",
        f"COPY: setp.ge.u32 %p1, %r2, {words}; @%p1 bra COPIED; mad.wide.u32 %d4, %r2, 4, %d2;",
        "ld.global.b32 %r3, [%d4];",
        "shl.b32 %r4, %r2, 2; add.s32 %r4, %r4, %r1; st.shared.b32 [%r4], %r3; add.s32 %r2, %r2, 128; bra COPY;",
        "COPIED: fence.proxy.async.shared::cta; bar.sync 0;",
        f"shr.u32 %r5, %r1, 4; cvt.u64.u32 %d5, %r5; or.b64 %d5, %d5, {n << 16 | 8 << 32};",
        fence,
        f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.{accumulator}.{kind}.{kind} "
        f"{{{','.join(f'%c{r}' for r in range(registers))}}}, {{%a0,%a1,%a2,%a3}}, %d5, 1, {scale_a}, 1"
        + (", 0;" if ELEMENT[kind] == 2 else ";"),
        "wgmma.commit_group.sync.aligned;",
        between,
        wait,
        f"ld.param.b64 %d6, [p3]; mad.wide.u32 %d6, %t, {4 * registers}, %d6;",
        *[f"st.global.b32 [%d6+{4 * r}], %c{r};" for r in range(registers)],
    ]
    return kernel(4, "\n".join(lines), f".reg .b32 %a<4>;\n.reg .b32 %c<{max(registers, 1)}>;", 128)


def two_tiles_one_buffer(wait_for_mma: bool) -> tuple[str, Operand, Operand, int]:
    """D = A B^T over two K tiles that share one buffer: 128x64x(2*64), bf16, tcgen05.

    Without `wait_for_mma` the second TMA load is issued while the first MMAs may still read the buffer, the order of a
    published example (CUTLASS `1cta_mma_basic`) whose producer waits for its own data only.
    """
    a = Operand("a", 128, 64, 2, 128, False, 1024)
    b = Operand("b", 64, 64, 2, 128, False, 1024 + a.bytes)
    lines = [
        "mov.b32 %r1, smem; add.s32 %r2, %r1, 8; add.s32 %r3, %r1, 16;",
        "setp.eq.u32 %p1, %t, 0; setp.lt.u32 %p3, %t, 32;",
        "@%p1 mbarrier.init.shared::cta.b64 [%r1], 1; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;",
        "fence.proxy.async.shared::cta;",
        "@%p3 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 64;",
        "bar.sync 0; ld.shared.b32 %r4, [%r3];",
        f"mov.b32 %r5, {1 << 4 | 1 << 7 | 1 << 10 | 8 << 17 | 8 << 24}; mov.b64 %d1, p0; mov.b64 %d2, p1;",
    ]
    for tile in range(2):
        lines += [
            f"@!%p1 bra LOADED{tile};",
            f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {a.bytes + b.bytes};",
            *a.loads("%d1", "%r1", 64 * tile),
            *b.loads("%d2", "%r1", 64 * tile),
            f"LOADED{tile}: bar.warp.sync -1;",
            f"WAIT{tile}: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], {tile}; @!%p2 bra WAIT{tile};",
            f"@!%p1 bra ISSUED{tile};",
        ]
        for step in range(4):
            for register, operand in (("%d3", a), ("%d4", b)):
                offset, fixed = operand.descriptor(step, False)
                lines.append(
                    f"mov.b32 %r21, smem; add.s32 %r21, %r21, {offset}; shr.u32 %r21, %r21, 4; "
                    f"cvt.u64.u32 {register}, %r21; or.b64 {register}, {register}, {fixed};"
                )
            lines.append(
                f"setp.ne.u32 %p4, {4 * tile + step}, 0; tcgen05.mma.cta_group::1.kind::f16 [%r4], %d3, %d4, %r5, %p4;"
            )
        if wait_for_mma or tile == 1:
            lines.append("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];")
        lines.append(f"ISSUED{tile}: bar.warp.sync -1;")
        if wait_for_mma or tile == 1:
            parity = tile if wait_for_mma else 0
            lines.append(
                f"DONE{tile}: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], {parity}; @!%p2 bra DONE{tile};"
            )
            # Or a late warp would find the next phase of the same parity.
            lines.append("bar.sync 0;")
    lines += [
        "ld.param.b64 %d5, [p2]; mad.wide.u32 %d5, %t, 256, %d5; and.b32 %r6, %t, 96; shl.b32 %r6, %r6, 16;",
        "add.s32 %r8, %r4, %r6;",
    ]
    for column in range(0, 64, 8):
        names = ",".join(f"%r{30 + c}" for c in range(8))
        lines.append(f"add.s32 %r9, %r8, {column}; tcgen05.ld.sync.aligned.32x32b.x8.b32 {{{names}}}, [%r9];")
        lines.append("tcgen05.wait::ld.sync.aligned;")
        lines += [f"st.global.b32 [%d5+{4 * (column + c)}], %r{30 + c};" for c in range(8)]
    lines += ["bar.sync 0; @%p3 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 64;"]
    params = ".param .align 64 .b8 p0[128],\n.param .align 64 .b8 p1[128],\n.param .u64 p2"
    text = kernel(0, "\n".join(lines), "", 128).replace(".entry k(\n\n)", f".entry k(\n{params}\n)")
    return text, a, b, b.start + b.bytes


def tensor_memory_product(pair: bool, a_in_tmem: bool, n: int) -> str:
    """PTX that multiplies one K step of 16 in bf16 with tcgen05: 128 rows a CTA, A in shared memory or TMEM; `pair`:
    two CTAs share the MMA, each with its rows of A and half the rows of B.

    Parameters: A, B as they lie in shared memory (columns of 16 bytes, first all rows of the first), A as it lies in
    TMEM (8 words a row), D (rows x n float32). Each holds the CTAs' parts one after the other.
    """
    group, rows_b = (2, n // 2) if pair else (1, n)
    m = 256 if pair else 128
    meet = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" if pair else "bar.sync 0;"

    def copy(name: str, param: str, words: int, start: int) -> str:
        return (
            f"ld.param.b64 %d1, [{param}]; mad.wide.u32 %d1, %r3, {4 * words}, %d1; mov.b32 %r9, %t;\n"
            f"{name}: setp.ge.u32 %p2, %r9, {words}; @%p2 bra {name}END; mad.wide.u32 %d2, %r9, 4, %d1;\n"
            f"ld.global.b32 %r10, [%d2]; shl.b32 %r11, %r9, 2; add.s32 %r11, %r11, %r1;\n"
            f"st.shared.b32 [%r11+{start}], %r10; add.s32 %r9, %r9, 128; bra {name}; {name}END:"
        )

    def descriptor(register: str, start: int, rows: int) -> str:
        fixed = rows << 16 | 8 << 32 | 1 << 46
        return (
            f"add.s32 %r9, %r1, {start}; shr.u32 %r9, %r9, 4; cvt.u64.u32 {register}, %r9;\n"
            f"or.b64 {register}, {register}, {fixed};"
        )

    words = ",".join(f"%r{20 + c}" for c in range(8))
    to_tmem = (
        "ld.param.b64 %d1, [p2]; mad.lo.s32 %r9, %r3, 128, %t; mad.wide.u32 %d1, %r9, 32, %d1;\n"
        + "".join(f"ld.global.b32 %r{20 + c}, [%d1+{4 * c}];" for c in range(8))
        + f"\ntcgen05.st.sync.aligned.32x32b.x8.b32 [%r6+{n}], {{{words}}}; tcgen05.wait::st.sync.aligned;"
    )
    lines = [
        "mov.b32 %r1, smem; add.s32 %r2, %r1, 16; setp.eq.u32 %p1, %t, 0; setp.lt.u32 %p3, %t, 32;",
        "mov.u32 %r3, %ctaid.x; mov.u32 %r4, %cluster_ctarank; setp.ne.u32 %p4, %r4, 0; mov.b16 %h1, 3;",
        "@%p1 mbarrier.init.shared::cta.b64 [%r1], 1; fence.mbarrier_init.release.cluster;",
        f"@%p3 tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r2], 256;",
        copy("B", "p1", 8 * rows_b, 1024),
        copy("A", "p0", 1024, 9216),
        "fence.proxy.async.shared::cta; bar.sync 0; ld.shared.b32 %r5, [%r2];",
        "and.b32 %r6, %t, 96; shl.b32 %r6, %r6, 16; add.s32 %r6, %r6, %r5;",
        to_tmem if a_in_tmem else "",
        meet,
        "@!%p1 bra ISSUED; @%p4 bra ISSUED;",
        descriptor("%d3", 9216, 128),
        descriptor("%d4", 1024, rows_b),
        f"mov.b32 %r7, {1 << 4 | 1 << 7 | 1 << 10 | (n // 8) << 17 | (m // 16) << 24}; setp.ne.u32 %p5, %t, %t;",
        f"add.s32 %r8, %r5, {n};",
        f"tcgen05.mma.cta_group::{group}.kind::f16 [%r5], {'[%r8]' if a_in_tmem else '%d3'}, %d4, %r7, %p5;",
        "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r1], %h1;"
        if pair
        else "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];",
        "ISSUED: bar.warp.sync -1; WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra WAIT;",
        f"ld.param.b64 %d5, [p3]; mad.lo.s32 %r9, %r3, 128, %t; mad.wide.u32 %d5, %r9, {4 * n}, %d5;",
    ]
    for column in range(0, n, 8):
        lines.append(
            f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {{{words}}}, [%r6+{column}]; tcgen05.wait::ld.sync.aligned;"
        )
        lines += [f"st.global.b32 [%d5+{4 * (column + c)}], %r{20 + c};" for c in range(8)]
    lines += [meet, f"@%p3 tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r5, 256;"]
    return kernel(4, "\n".join(lines), threads=128)
