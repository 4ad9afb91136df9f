"""Writes wgmma_instructions.cuh: a struct per element type and N, as PTX wants registers named.

Run ``python generate_wgmma.py > wgmma_instructions.cuh`` after a change; a test compares the two.
"""

# N of S = Q K^T are the block_n of tiles.h, N of O += P V its head_dims; the products of the
# backward (backward_tiles.h) need no other sizes.
SIZES = (64, 80, 96, 112, 128, 192, 256)
TYPES = {"kHalf": "f16", "kBfloat16": "bf16"}


def instruction(n: int, ptx_type: str, name: str, a_mn: int, b_mn: int) -> list[str]:
    """One wrapper: ``ss`` takes A through a descriptor, ``rs`` from four registers."""
    registers = n // 2
    from_shared = name.startswith("ss")
    a_count = 1 if from_shared else 4
    a_slots = [f"%{registers + i}" for i in range(a_count)]
    a_text = a_slots[0] if from_shared else "{" + ", ".join(a_slots) + "}"
    b_slot = registers + a_count
    # Behind the accumulate predicate: +A, +B, then of operands in shared memory: is it MN-major.
    tail = f"1, 1, {a_mn}, {b_mn}" if from_shared else f"1, 1, {b_mn}"
    a_parameter = "uint64_t a" if from_shared else "const uint32_t* a"
    a_inputs = ['"l"(a)'] if from_shared else [f'"r"(a[{i}])' for i in range(4)]
    accumulators = ", ".join(f"%{i}" for i in range(registers))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(registers))
    inputs = ", ".join([*a_inputs, '"l"(b)', '"r"(accumulate)'])
    return [
        f"  static __device__ __forceinline__ void {name}(float (&d)[{registers}], "
        f"{a_parameter}, uint64_t b, int accumulate) {{",
        '    asm volatile("{\\n.reg .pred p;\\n"',
        f'                 "setp.ne.b32 p, %{b_slot + 1}, 0;\\n"',
        f'                 "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx_type}.{ptx_type} "',
        f'                 "{{{accumulators}}}, "',
        f'                 "{a_text}, %{b_slot}, p, {tail};\\n}}\\n"',
        f"                 : {outputs}",
        f"                 : {inputs});",
        "  }",
    ]


def main() -> None:
    """Print the header."""
    lines = [
        "// Written by generate_wgmma.py; do not edit.",
        "//   ss        S = Q K^T: A and B through descriptors, K-major",
        "//   rs        S = Q K^T: A in registers, B through a descriptor, K-major",
        "//   rs_mn     O += P V: A in registers, B through a descriptor, MN-major (transposed)",
        "//   ss_mn_mn  dQ += (dS^T)^T K: A and B through descriptors, MN-major",
        "// clang-format off",
        "#pragma once",
        "",
        "#include <stdint.h>",
        "",
        '#include "element.h"',
        "",
        "namespace fa4 {",
        "",
        "template <Element kElement, int kN>",
        "struct WgmmaInstruction;",
        "",
    ]
    for element, ptx_type in TYPES.items():
        for n in SIZES:
            lines += [
                "template <>",
                f"struct WgmmaInstruction<Element::{element}, {n}> {{",
                *instruction(n, ptx_type, "ss", 0, 0),
                *instruction(n, ptx_type, "rs", 0, 0),
                *instruction(n, ptx_type, "rs_mn", 0, 1),
                *instruction(n, ptx_type, "ss_mn_mn", 1, 1),
                "};",
                "",
            ]
    lines.append("}  // namespace fa4")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
