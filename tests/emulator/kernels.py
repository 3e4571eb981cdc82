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
    for at, (ty, width) in enumerate(zip(types, widths)):
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
