"""The CUDA kernels of csrc/, compiled for the host by g++ and compared with plain PyTorch (emulator/emulator.h).

``python tests/helpers/emulation.py LIBRARY [START]`` runs the comparisons (those whose names begin so) on a library
built here.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cuma_ds.ops import GATE_NORMS, reference

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = ("gate", "scale")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-subobject-linkage"]


def translate(source: str) -> str:
    """Launches and shared arrays, the two things g++ cannot read, as calls of the emulator; all else untouched."""
    source = re.sub(
        r"(\w+(?:<[\w\s,.:]+>)?)<<<(.+?)>>>\((.+?)\);",
        r"emulator::launch(\2, [=] { \1(\3); });",
        source,
        flags=re.DOTALL,
    )
    return re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulator::shared_memory.data());",
        source,
    )


def build(folder: Path, flags: Sequence[str] = (), change: tuple[str, str, str] | None = None) -> Path:
    """Build the library in `folder`; objects that are there are kept.

    `change` = (kernel file, its text, other text).
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiler = [
        "g++",
        "-std=c++17",
        "-O0",
        "-g",
        "-fPIC",
        "-D__CUDACC__",
        f"-I{HERE.parent / 'emulator'}",
        f"-I{CSRC}",
        *WARNINGS,
        *flags,
    ]
    running = []
    for name in (*SOURCES, "driver"):
        if (folder / f"{name}.o").exists():
            continue
        if name == "driver":
            place = HERE.parent / "emulator" / "driver.cpp"
        else:
            text = (CSRC / "cuda" / f"{name}.cu").read_text()
            if change and change[0] == name:
                if text.count(change[1]) != 1:
                    raise ValueError(f"{name}.cu has {text.count(change[1])} times {change[1]!r}; expected once")
                text = text.replace(*change[1:])
            place = folder / f"{name}.cpp"
            place.write_text(f'#line 1 "csrc/cuda/{name}.cu"\n' + translate(text))
        running.append(
            subprocess.Popen([*compiler, f"-I{CSRC / 'cuda'}", "-c", str(place), "-o", str(folder / f"{name}.o")])
        )
    if any([process.wait() for process in running]):
        raise RuntimeError("the kernels do not compile on the emulator")
    library = folder / "emulated.so"
    objects = [str(folder / f"{name}.o") for name in (*SOURCES, "driver")]
    subprocess.run([*compiler, "-shared", *objects, "-o", str(library)], check=True)
    return library


class Emulator:
    """The launchers of one built library, by name; lanes and blocks run in rising or falling order."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def __call__(self, name: str, *arguments: Tensor | int | float | torch.dtype | None) -> None:
        """Run one launcher; AssertionError with the emulator's words if it cannot go on."""
        function = self.library[name]
        function.restype = ctypes.c_char_p
        error = function(*map(_argument, arguments))
        if error:
            raise AssertionError(f"{name}: {error.decode()}")

    def in_both_orders(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `run` returns, the same to the last bit whichever way lanes and blocks take turns."""
        self("set_backwards", 1)
        falling = run()
        self("set_backwards", 0)
        rising = run()
        for one, other in zip(rising, falling, strict=True):
            assert torch.equal(one, other), "the result depends on the order of lanes or blocks"
        return rising


def _argument(value: Tensor | int | float | torch.dtype | None) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int64(TYPES.index(value))
    if isinstance(value, float):
        return ctypes.c_double(value)
    return None if value is None else ctypes.c_int64(value)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel must fill: nothing in it can be mistaken for a result."""
    return torch.full(shape, -7 if dtype == torch.int32 else 12345.0, dtype=dtype)


def close(name: str, one: Tensor, other: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
    torch.testing.assert_close(
        one.double() / scale, other.double() / scale, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
    )


def same(name: str, one: Tensor, other: Tensor) -> None:
    assert torch.equal(one, other), f"{name}: {one.tolist()} instead of {other.tolist()}"


# T, E, K, N: one of all; odd sizes; tokens in several chunks; each number of lanes a token and experts a lane
GATES = [(1, 1, 1, 1), (7, 5, 3, 2), (130, 8, 2, 3), (9, 13, 4, 2), (9, 16, 5, 2), (5, 33, 8, 9), (5, 20, 20, 2),
         (21, 30, 8, 2), (5, 60, 9, 2), (4, 100, 2, 1), (4, 100, 20, 1), (3, 130, 3, 2), (2, 257, 2, 2),
         (3, 512, 8, 3)]  # fmt: skip


def compare_gate(
    emulator: Emulator, shape: tuple[int, int, int, int], norm: str, profiles: bool, dtype: torch.dtype
) -> None:
    """Forward and backward, with ties and padding; with enough tokens also a NaN and an index out of range."""
    tokens, experts, top_k, rows = shape
    top_k = experts if norm == "softmax" else top_k
    generator = torch.Generator().manual_seed(tokens + experts)
    hidden = ((torch.randn(tokens, experts, generator=generator) * 8).round() / 4).to(dtype)
    profile = (torch.randn(rows, experts, generator=generator) * 8).round() / 4
    index = torch.randint(-1, rows, (tokens,), generator=generator)
    index[0] = 0
    known = index.clone()
    if tokens > 4:
        index[1], hidden[1] = 0, float("nan")
        known[1] = index[1]
        if profiles:
            index[3], known[3] = rows, -1
    places = (hidden, profile if profiles else None, index)
    sizes = (tokens, rows if profiles else 0, experts, top_k, GATE_NORMS.index(norm))

    def forward() -> list[Tensor]:
        weight, expert = unwritten(tokens, top_k), unwritten(tokens, top_k, dtype=torch.int32)
        sums = [unwritten(experts), unwritten(experts), unwritten(1), unwritten(1)]
        emulator("gate", dtype, *places, *sizes, weight, expert, *sums)
        return [weight, expert, *sums]

    h, p = hidden.clone().requires_grad_(), profile.clone().requires_grad_()
    expected = reference.demographic_gate(h, p if profiles else None, known, top_k, norm)
    weight, expert, load, weight_sum, entropy, invalid = emulator.in_both_orders(forward)
    same("experts", expert, expected.expert_TK)
    same("load", load, expected.load_E)
    close("weights", weight, expected.weight_TK.detach())
    close("weight sums", weight_sum, expected.weight_sum_E.detach())
    close("entropy", entropy, expected.entropy.view(1))
    assert invalid.item() == expected.invalid + (tokens > 4 and profiles), "tokens that cannot be routed are counted"

    d_weight, d_sum = torch.randn(tokens, top_k, generator=generator), torch.randn(experts, generator=generator)
    for given in ((d_weight, d_sum), (d_weight, None), (None, d_sum)):

        def backward(given: tuple[Tensor | None, Tensor | None] = given) -> list[Tensor]:
            d_hidden, d_profile = unwritten(tokens, experts, dtype=dtype), unwritten(rows, experts)
            emulator(
                "gate_backward",
                dtype,
                *places,
                *sizes,
                weight,
                expert,
                *given,
                d_hidden,
                d_profile if profiles else None,
            )
            return [d_hidden, d_profile]

        d_hidden, d_profile = emulator.in_both_orders(backward)
        loss = sum(
            (out * d).sum()
            for out, d in zip((expected.weight_TK, expected.weight_sum_E), given, strict=True)
            if d is not None
        )
        grads = torch.autograd.grad(loss, (h, p) if profiles else (h,), retain_graph=True)
        close("gradient of the hidden logits", d_hidden, grads[0], dtype)
        if profiles:
            close("gradient of the profile logits", d_profile, grads[1])


# T, E, K, r: whole vectors of 16 bytes, and sizes that are not
SCALES = [(1, 1, 1, 1), (9, 8, 2, 8), (31, 5, 5, 3), (3, 70, 8, 4), (40, 8, 2, 64), (6, 4, 2, 0)]


def compare_scale(
    emulator: Emulator, shape: tuple[int, int, int, int], shared: bool, aligned: bool, dtype: torch.dtype
) -> None:
    """Forward and backward; `aligned`, or one element past where 16 bytes can be read at once."""
    tokens, experts, top_k, rank = shape
    generator = torch.Generator().manual_seed(tokens + experts)
    rows = 1 if shared else experts

    def numbers(*sizes: int) -> Tensor:
        flat = torch.randn(torch.Size(sizes).numel() + 1, generator=generator).to(dtype)
        return (flat[:-1] if aligned else flat[1:]).view(sizes)

    z, d_out = numbers(tokens, rows, rank), numbers(tokens, experts, rank)
    weight = torch.rand(tokens, top_k, generator=generator)
    expert = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    expert[torch.rand(tokens, generator=generator) < 0.2] = -1
    exact = (z.double(), weight.double(), expert)

    def forward() -> list[Tensor]:
        out = unwritten(tokens, experts, rank, dtype=dtype)
        emulator("gate_scale", dtype, z, weight, expert, tokens, experts, top_k, rank, shared, 1.5, out)
        return [out]

    if rank:
        close("scaled", emulator.in_both_orders(forward)[0], reference.gate_scale(*exact, experts, 1.5), dtype)

    def backward() -> list[Tensor]:
        outs = [unwritten(*z.shape, dtype=dtype), unwritten(tokens, top_k)]
        sizes = (tokens, experts, top_k, rank, shared, 1.5)
        emulator("gate_scale_backward", dtype, d_out, z, weight, expert, *sizes, *outs)
        return outs

    leaves = [exact[0].requires_grad_(), exact[1].requires_grad_()]
    theirs = torch.autograd.grad(reference.gate_scale(*leaves, expert, experts, 1.5), leaves, d_out.double())
    for name, one, other in zip(("d_z", "d_weight"), emulator.in_both_orders(backward), theirs, strict=True):
        close(name, one, other, dtype)


def comparisons(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[Emulator], None]]]:
    """All comparisons by name.

    The 16-bit types differ in how elements are read and written, so fewer shapes are enough.
    """
    shapes = slice(None) if dtype == torch.float32 else slice(1, 3)
    for shape in GATES[shapes]:
        for norm in GATE_NORMS:
            for profiles in (True, False):
                yield (
                    f"gate {shape} {norm} {profiles}",
                    lambda e, s=shape, n=norm, p=profiles: compare_gate(e, s, n, p, dtype),
                )
    for shape in SCALES[shapes]:
        for shared in (False, True):
            for aligned in (True, False):
                yield (
                    f"scale {shape} {shared} {aligned}",
                    lambda e, s=shape, a=shared, b=aligned: compare_scale(e, s, a, b, dtype),
                )


def main() -> None:
    """Comparisons in all dtypes."""
    emulator = Emulator(Path(sys.argv[1]))
    start = sys.argv[2] if len(sys.argv) > 2 else ""
    count = 0
    for dtype in TYPES:
        for name, compare in comparisons(dtype):
            if name.startswith(start):
                try:
                    compare(emulator)
                except AssertionError as error:
                    raise SystemExit(f"{name} {dtype}: {error}") from error
                count += 1
    print(f"{count} comparisons hold")


if __name__ == "__main__":
    main()
