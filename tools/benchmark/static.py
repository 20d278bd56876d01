#!/usr/bin/env python3
"""What our Triton kernels compile to, without a GPU: registers, spills, shared memory and the product loop's
instructions.

    python tools/benchmark/static.py                   the table for sm_90a, its gates, and the golden profile
    python tools/benchmark/static.py --arch 80         compile for another architecture (80, 100): spills only
    python tools/benchmark/static.py --update          accept today's profile as golden
    python tools/benchmark/static.py --json            the same as JSON

It fails (exit 1) where a gate does not hold or a field is worse than golden. It catches regressions - spills,
narrow loads, a loop that lost its asynchronous copies - and does not predict TFLOP/s.

Method: ``triton.compile`` ahead of time, then nvdisasm on the cubin. Pointers are 16-byte aligned, as torch's
are. The product loop is the innermost loop with the most tensor-core instructions. An HGMMA m64nNk16 keeps
one multiprocessor's tensor cores busy for N/2 cycles; the issue ratio is the cycles that the loop's
instructions take to issue (warps x instructions / 4 schedulers) over those: above 1 the loop is bound by
issue.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools.benchmark.static_specs import Spec, decode_specs, product_specs, row_specs

GOLDEN = Path(__file__).with_name("static_golden.json")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# the issue ratio a product kernel's loop may reach on sm_90a
ISSUE_GATES = {
    "grouped_gemm_nt": 0.20,
    "grouped_gemm_nn": 0.20,
    "weight": 0.20,
    "weight_accumulate": 0.20,
    "up": 0.30,
    "up_inference": 0.30,
    "down_backward": 0.45,
}
MAX_REGISTERS = 176


def compile_ahead(spec: Spec, arch: int):
    """The compiled kernel for one architecture; needs no GPU."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(spec.kernel.arg_names):
        if name in spec.constants:
            signature[name], constants[(i,)] = "constexpr", spec.constants[name]
            continue
        signature[name] = spec.signature[name]
        is_any = spec.kernel.params[i].do_not_specialize or name in spec.unaligned
        if signature[name].startswith(("*", "i")) and not is_any:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(spec.options))


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


def disassemble(cubin: bytes) -> tuple[list[Instruction], list[tuple[int, int]], int]:
    """(instructions, backward branches as index ranges, registers per thread)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run(
                [_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"`\((\.L_\w+)\)", found[2])
            if found[1].startswith("BRA") and target and labels.get(target[1], len(code) + 1) <= len(code):
                loops.append((labels[target[1]], len(code)))
            code.append(Instruction(found[1], found[2]))
    return code, loops, int(re.search(r"REG:(\d+)", usage)[1])


def _is_product(instruction: Instruction) -> bool:
    return instruction.name in ("HGMMA", "HMMA")


def product_loop(code: list[Instruction], loops: list[tuple[int, int]]) -> list[Instruction]:
    """The innermost loop with the most tensor-core instructions; empty where there is none."""
    with_product = [(a, b) for a, b in loops if any(map(_is_product, code[a : b + 1]))]
    innermost = [
        (a, b)
        for a, b in with_product
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in with_product)
    ]
    bodies = [code[a : b + 1] for a, b in innermost]
    return max(bodies, key=lambda body: sum(map(_is_product, body)), default=[])


def loop_profile(body: list[Instruction], warps: int) -> dict[str, object]:
    """Counts of one product loop, and its issue ratio where the products are wgmma."""
    count = collections.Counter(i.name for i in body)
    shapes = [
        tuple(map(int, m.groups())) for i in body if (m := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", i.opcode))
    ]
    profile = {
        "instructions": len(body),
        "products": sum(map(_is_product, body)),
        "wgmma_n": min((n for _, n, _ in shapes), default=0),
        "tma_loads": count["UTMALDG"],
        "cp_async": count["LDGSTS"],
        "cp_async_narrow": sum(i.name == "LDGSTS" and ".128" not in i.opcode for i in body),
        "sync_loads": count["LDG"],
        "legacy_products": count["HMMA"],
    }
    if shapes:
        # each of the warps/4 warp groups issues its own wgmma to the same tensor cores
        busy = sum(n / 2 for _, n, _ in shapes) * max(1, warps // 4)
        profile["issue_ratio"] = round(len(body) * warps / 4 / busy, 3)
    return profile


def profile(spec: Spec, arch: int) -> dict[str, object]:
    """The static profile of one kernel."""
    compiled = compile_ahead(spec, arch)
    code, loops, registers = disassemble(compiled.asm["cubin"])
    count = collections.Counter(i.name for i in code)
    found = {
        "registers": registers,
        "spills": count["LDL"] + count["STL"],
        "shared_bytes": compiled.metadata.shared,
        "instructions": len(code),
        "tma_stores": count["UTMASTG"],
    }
    body = product_loop(code, loops)
    if body:
        found["loop"] = loop_profile(body, compiled.metadata.num_warps)
    return found


def broken_gates(name: str, found: dict, arch: int) -> list[str]:
    """Which gates the profile of one kernel breaks; on other architectures than sm_90a only spills count."""
    broken = [f"{name}: {found['spills']} spills, must be 0"] if found["spills"] else []
    if arch != 90 or name not in ISSUE_GATES:
        return broken
    loop = found.get("loop")
    if loop is None:
        return [*broken, f"{name}: no tensor-core loop"]
    rules = [
        (found["registers"] <= MAX_REGISTERS, f"{found['registers']} registers, at most {MAX_REGISTERS}"),
        (not loop["legacy_products"], f"{loop['legacy_products']} mma.sync in the loop, wgmma only"),
        (loop["wgmma_n"] >= 128, f"wgmma n = {loop['wgmma_n']}, at least 128"),
        (not loop["sync_loads"], f"{loop['sync_loads']} synchronous global loads in the loop, none"),
        (not loop["cp_async_narrow"], f"{loop['cp_async_narrow']} cp.async under 16 bytes, none"),
        (loop["tma_loads"] >= 2, f"{loop['tma_loads']} TMA loads in the loop, at least 2"),
        (
            loop["issue_ratio"] <= ISSUE_GATES[name],
            f"issue ratio {loop['issue_ratio']}, at most {ISSUE_GATES[name]}",
        ),
    ]
    return broken + [f"{name}: {text}" for holds, text in rules if not holds]


# fields of which more is better; of all others, less
_MORE_IS_BETTER = {"products", "wgmma_n", "tma_loads", "tma_stores"}


def worse_fields(name: str, found: dict, golden: dict) -> list[str]:
    """Fields that are worse than golden, loop fields included."""
    worse = []
    for key, was in golden.items():
        now = found.get(key)
        if isinstance(was, dict):
            worse += worse_fields(f"{name}.{key}", now or {}, was)
        elif now is None or (now < was if key in _MORE_IS_BETTER else now > was):
            worse.append(f"{name}.{key}: {now}, golden {was}")
    return worse


def _table(profiles: dict[str, dict]) -> str:
    head = {"regs": 6, "spills": 8, "smem KB": 9, "loop": 6, "TMA": 5, "cp.async": 10, "LDG": 5, "issue": 7}
    lines = [f"{'kernel':24}" + "".join(f"{name:>{width}}" for name, width in head.items())]
    for name, found in profiles.items():
        loop = collections.defaultdict(lambda: "-", found.get("loop", {}))
        lines.append(
            f"{name:24}{found['registers']:>6}{found['spills']:>8}{found['shared_bytes'] // 1024:>9}"
            f"{loop['instructions']:>6}{loop['tma_loads']:>5}{loop['cp_async']:>10}{loop['sync_loads']:>5}"
            f"{loop['issue_ratio']:>7}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90, 100))
    parser.add_argument("--update", action="store_true", help="write the golden profile instead of comparing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    specs = product_specs(args.arch) | row_specs() | decode_specs()
    profiles = {name: profile(spec, args.arch) for name, spec in specs.items()}
    problems = [
        problem for name, found in profiles.items() for problem in broken_gates(name, found, args.arch)
    ]
    if args.arch == 90 and args.update:
        golden = {"triton": triton.__version__, "kernels": profiles}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    elif args.arch == 90:
        golden = json.loads(GOLDEN.read_text())
        if golden["triton"] == triton.__version__:
            for name in golden["kernels"]:
                problems += worse_fields(name, profiles.get(name, {}), golden["kernels"][name])
        else:
            print(
                f"golden profile is of triton {golden['triton']}, this is {triton.__version__}: gates only",
                file=sys.stderr,
            )
    print(json.dumps({"profiles": profiles, "problems": problems}) if args.json else _table(profiles))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
