"""The Triton kernels compiled for devices that are not here: what can be told of their speed.

Nothing is spilled, little shared memory is taken, and where the goal is the memory's speed, the
instructions leave room for it.

What is compiled is what a call launches: the operators are called on CPU tensors, and their
launches are kept instead of made.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from custom_ops.kernels import cuda as face

if face.interpreted:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from custom_ops.kernels.cuda import launch as launching  # noqa: E402
from custom_ops.kernels.cuda import operators as ops  # noqa: E402
from custom_ops.kernels.problem import Options  # noqa: E402
from custom_ops.node import launcher as node  # noqa: E402

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PLAIN = {"label_smoothing": 0.0, "z_loss": 0.0, "logit_scale": 1.0, "softcap": None}
ALL = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_scale": 0.5, "softcap": 30.0}
# The largest block that every one of these devices gives without being asked.
SHARED = 48 * 1024
# In a cycle a multiprocessor of an H100 SXM (132 of them, 1.755 GHz, 3.35 TB/s) begins four
# instructions, each in 32 lanes, while the memory moves 14.5 bytes for it.
LANES_A_BYTE = 4 * 32 / (3.35e12 / 132 / 1.755e9)


def flattened(acc, options):
    return Options(1, acc, **options).flat()


def softmax(shape, dtype, log=False):
    ops.direct.softmax(torch.zeros(shape, dtype=dtype), 1, log)


def maps(shape, dtype):
    p = torch.zeros(shape, dtype=dtype)
    for op in (ops.direct.contract, ops.direct.log_softmax_vjp, ops.direct.log_softmax_jvp):
        op(p, p, 1)


def cross_entropy(
    shape, dtype, options=PLAIN, weighted=False, stats=False, labels=torch.int64, acc=None
):
    x, acc = torch.zeros(shape, dtype=dtype), acc or (F64 if dtype == F64 else F32)
    rows = (shape[0], *shape[2:])
    target = torch.zeros(shape) if labels is None else torch.zeros(rows, dtype=labels)
    weight = torch.ones(shape[1], dtype=acc) if weighted else None
    flat = flattened(acc, options)
    _, M, L, *_ = ops.direct.cross_entropy(x, target, weight, *flat, stats)
    q = M if weighted else None
    ops.direct.cross_entropy_vjp(x, target, weight, M, q, M, L, *flat)


def hessian(shape, dtype, options=PLAIN, weighted=False, labels=torch.int64):
    z, acc = torch.zeros(shape, dtype=dtype), F64 if dtype == F64 else F32
    target = torch.zeros(shape) if labels is None else torch.zeros(shape[0], dtype=labels)
    weight = torch.ones(shape[1], dtype=acc) if weighted else None
    M = torch.zeros(shape[0], dtype=acc)
    q = M if weighted else None
    flat = flattened(acc, options | {"logit_scale": 1.0, "softcap": None})
    ops.direct.cross_entropy_hvp_(z, target, weight, z, M, q, M, M, *flat)


# Rows in a tile, rows as long as one tile can be, rows in chunks; then classes in the middle.
SHAPES = {
    "few classes": (128, 10),
    "a thousand": (64, 1000),
    "in steps": (2, 10_000),
    "in two tiles": (2, 20_000),
    "a whole row": (2, 16384),
    "chunks": (2, 128256),
    "between two vectors": (2, 50257),
    "pixels": (2, 21, 32, 32),
    "pixels in chunks": (1, 1000, 8, 8),
}
CALLS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {}
for shape_name, shape in SHAPES.items():
    for dtype in (F32, BF16):
        kind = f"{shape_name}, {str(dtype)[6:]}"
        CALLS[f"softmax, {kind}"] = softmax, {"shape": shape, "dtype": dtype}
        CALLS[f"maps, {kind}"] = maps, {"shape": shape, "dtype": dtype}
        CALLS[f"cross-entropy, {kind}"] = cross_entropy, {"shape": shape, "dtype": dtype}
        if len(shape) == 2:
            CALLS[f"hessian, {kind}"] = hessian, {"shape": shape, "dtype": dtype}
REPRESENTATIVE = ("few classes, float32", "a whole row, float32", "chunks, bfloat16")
ONCE = {
    "the longest row": (softmax, {"shape": (2, 32768), "dtype": F32}),
    "the longest row, float64": (softmax, {"shape": (2, 8192), "dtype": F64}),
    "log-softmax": (softmax, {"shape": (64, 1000), "dtype": F16, "log": True}),
}
for shape_name in ("a thousand", "a whole row", "chunks", "between two vectors", "pixels"):
    for labels in (torch.int64, None):
        ONCE[f"every option, {shape_name}, {'labels' if labels else 'probabilities'}"] = (
            cross_entropy,
            {
                "shape": SHAPES[shape_name],
                "dtype": BF16,
                "options": ALL,
                "weighted": True,
                "stats": True,
                "labels": labels,
            },
        )
    for function in (softmax, maps, cross_entropy):
        name = f"{function.__name__}, {shape_name}, float64"
        ONCE[name] = (function, {"shape": SHAPES[shape_name], "dtype": F64})
for shape in ((2, 4096), (2, 128256)):
    for labels in (torch.int64, None):
        for dtype in (BF16, F64):
            kind = f"{shape[1]} classes, {str(dtype)[6:]}"
            ONCE[f"hessian, {kind}, {'labels' if labels else 'probabilities'}"] = (
                hessian,
                {
                    "shape": shape,
                    "dtype": dtype,
                    "options": ALL,
                    "weighted": True,
                    "labels": labels,
                },
            )
for dtype, acc in ((BF16, F64), (F16, F64), (F64, F32)):
    ONCE[f"{str(dtype)[6:]} computed in {str(acc)[6:]}"] = (
        cross_entropy,
        {"shape": (64, 10), "dtype": dtype, "options": ALL, "acc": acc},
    )
for shape_name in ("a thousand", "in steps", "pixels"):
    ONCE[f"bfloat16 computed in float64, {shape_name}"] = (
        cross_entropy,
        {
            "shape": SHAPES[shape_name],
            "dtype": BF16,
            "options": ALL,
            "weighted": True,
            "stats": True,
            "acc": F64,
        },
    )
for labels in (torch.uint8, torch.int32):
    ONCE[f"labels of {str(labels)[6:]}"] = (
        cross_entropy,
        {"shape": (64, 10), "dtype": F32, "labels": labels},
    )


def step(shape, dtype, weighted=False, labels=torch.int64, options=PLAIN):
    """A batch as the C++ node asks for it."""
    x, acc = torch.zeros(shape, dtype=dtype), F64 if dtype == F64 else F32
    target = torch.zeros(shape) if labels is None else torch.zeros(shape[0], dtype=labels)
    weight = torch.ones(shape[1], dtype=acc) if weighted else None
    flat, call = flattened(acc, options), node.FUNCTIONS
    for reduction in ("sum", "none", "mean"):
        plan = (*flat, reduction == "sum", dtype, reduction, 0.0)
        (loss, M, L, n, *_), _ = call["cross_entropy"](False, x, target, weight, *plan)
    call["cross_entropy_vjp"](False, x, target, weight, loss, None, M, L, n, *flat, False)


for dtype in (F32, F64, BF16):
    for weighted in (False, True):
        for labels in (torch.int64, None):
            kind = f"{str(dtype)[6:]}, {weighted}, {'labels' if labels else 'probabilities'}"
            ONCE[f"a batch of the node, {kind}"] = (
                step,
                {"shape": (128, 10), "dtype": dtype, "weighted": weighted, "labels": labels},
            )
            if dtype == F64:
                ONCE[f"every option of the node, {kind}"] = (
                    step,
                    {
                        "shape": (128, 10),
                        "dtype": dtype,
                        "weighted": weighted,
                        "labels": labels,
                        "options": ALL,
                    },
                )
for dtype in (F32, F64):
    ONCE[f"many rows of the node, {str(dtype)[6:]}"] = step, {"shape": (5000, 10), "dtype": dtype}
for labels in (torch.int64, torch.int32):
    target = torch.zeros(5000, dtype=labels)
    ONCE[f"a look at the labels, {str(labels)[6:]}"] = (
        ops.report,
        {"target": target, "classes": 10, "ignore_index": -100},
    )


class Compiled(NamedTuple):
    kernel: str
    spilled: int
    shared: int
    registers: int
    listing: str

    @property
    def all(self) -> int:
        """How many instructions there are."""
        return len(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?!NOP)\S", self.listing, re.MULTILINE))

    def executed(self, trips: int) -> int:
        """How many instructions run, a loop so many times, and no branch of the unlikely.

        These are a bad label, and the ends of a row that begins between two vectors.
        """
        code, labels, jumps = 0, dict[str, int](), list[tuple[int, str]]()
        for line in self.listing.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = code
            elif re.match(r"\s+/\*[0-9a-f]+\*/\s+(?!NOP)\S", line):
                code += 1
                if jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", line):
                    jumps.append((code, jump[1]))
        times = [1] * code
        for here, label in jumps:
            there = labels[label]
            for i in range(there, here):
                times[i] = 1 if here - there < 4 else trips  # the shorter one is the code's end
        for here, label in jumps:
            if labels[label] - here > 30 and times[here - 1]:
                times[here : labels[label]] = [0] * (labels[label] - here)
        return sum(times)


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def compiled(self, architecture: int, wide: bool, folder: Path) -> Compiled:
        """Compile as JITFunction.run would; `wide` with sizes and strides beyond 32 bits."""
        target = GPUTarget("cuda", architecture, 32)
        backend, fn = make_backend(target), self.kernel
        bound, specialization, options = create_function_from_signature(
            fn.signature, fn.params, backend
        )(*self.args, **self.kwargs)
        if wide:
            # rows and strides: all sizes but those of the classes and of what lies inside
            counts = {k: v for k, v in bound.items() if isinstance(v, int)}
            wider = {k: 2**40 for k, v in counts.items() if k in ("n", "rows") and v > 1}
            if "sizes" in bound:
                strides = (2**40 for _ in bound["sizes"][2:])
                wider["sizes"] = (*bound["sizes"][:2], *strides)
            assert wider
            return Launch(fn, (), self.kwargs | bound | wider).compiled(architecture, False, folder)
        options, signature, constants, attributes = fn._pack_args(
            backend, self.kwargs, bound, specialization, options
        )
        source = ASTSource(fn, signature, constants, attributes)
        kernel = triton.compile(source, target=target, options=options.__dict__)
        (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
        # the assembler's own account; the driver's needs a device
        name = "ptxas-blackwell" if architecture >= 100 else "ptxas"
        suffix = "a" if architecture >= 90 else ""
        cubin = folder / "kernel.cubin"
        command = ("-v", f"--gpu-name=sm_{architecture}{suffix}", folder / "kernel.ptx")
        report = tool(name, *command, "-o", cubin).stderr
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
        (registers,) = re.findall(r"Used (\d+) registers", report)
        listing = tool("nvdisasm", "-c", cubin).stdout
        return Compiled(fn.__name__, spilled, kernel.metadata.shared, int(registers), listing)

    def lanes(self, compiled: Compiled, classes: int) -> float:
        """Instructions of a lane for each number of a row."""
        args = dict(zip(self.kernel.arg_names, self.args, strict=True))
        kind, chunks = args["KIND"], args.get("chunks", 1)
        first_is_apart = self.kernel.__name__.startswith("cross_entropy")
        executed = compiled.executed(kind.STEPS - 1 if first_is_apart else kind.STEPS)
        if "lead" in args:  # a program takes a chunk's sums and maps another, both behind a branch
            executed = compiled.all
        return executed * chunks * 32 * self.kwargs["num_warps"] / (kind.ROWS * classes)


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of the tools that Triton brings along."""
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def launches(monkeypatch: pytest.MonkeyPatch, call: Callable[..., None], case: dict) -> list:
    kept: list[Launch] = []

    def keep(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kept.append(Launch(fn, args, kwargs))

    monkeypatch.setattr(JITFunction, "run", keep)
    call(**case)
    monkeypatch.undo()
    assert kept
    return kept


def check(kept: list, architecture: int, folder: Path, wide: bool = False) -> None:
    for launch in kept:
        compiled = launch.compiled(architecture, wide, folder)
        print(compiled._replace(listing=""))
        assert compiled.spilled == 0, compiled.kernel
        assert compiled.shared <= SHARED, compiled.kernel


@pytest.mark.parametrize("case", CALLS)
def test_compiles_for_sm_90(monkeypatch, tmp_path: Path, case: str):
    check(launches(monkeypatch, *CALLS[case]), 90, tmp_path)


@pytest.mark.parametrize("case", ONCE)
def test_every_variant_compiles_for_sm_90(monkeypatch, tmp_path: Path, case: str):
    check(launches(monkeypatch, *ONCE[case]), 90, tmp_path)


@pytest.mark.parametrize("architecture", [80, 100])
@pytest.mark.parametrize("case", [c for c in CALLS if c.partition(", ")[2] in REPRESENTATIVE])
def test_compiles_for_older_and_newer_devices(
    monkeypatch, tmp_path: Path, case: str, architecture: int
):
    check(launches(monkeypatch, *CALLS[case]), architecture, tmp_path)


@pytest.mark.parametrize("case", [c for c in CALLS if c.partition(", ")[2] in REPRESENTATIVE])
def test_compiles_where_sizes_need_64_bits(monkeypatch, tmp_path: Path, case: str):
    check(launches(monkeypatch, *CALLS[case]), 90, tmp_path, wide=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("function", "shape", "shares"),
    [
        (softmax, (2, 8192), {"softmax_whole": 2 / 3}),
        (maps, (2, 8192), {"map_whole": 2 / 3}),
        (softmax, (2, 131072), {"softmax_chunks": 0.9}),
        (maps, (2, 131072), {"map_chunks": 2 / 3}),
        (cross_entropy, (2, 128256), {"cross_entropy_partial": 2 / 3, "gradient": 2 / 3}),
        (cross_entropy, (2, 50257), {"cross_entropy_partial": 0.9, "gradient": 2 / 3}),
        (cross_entropy, (2, 10_000), {"cross_entropy_whole": 2 / 3, "gradient": 2 / 3}),
        (cross_entropy, (64, 1000), {"cross_entropy_whole": 0.8, "gradient": 2 / 3}),
        (cross_entropy, (1, 19, 32, 32), {"cross_entropy_whole": 1.1, "gradient": 2 / 3}),
    ],
)
def test_the_instructions_begin_in_a_share_of_the_memorys_time(
    monkeypatch, tmp_path: Path, function, shape, shares: dict[str, float], dtype
):
    """Each kernel reads and writes so many tensors once; more instructions would hold it up.

    Those of more than two thirds read numbers one by one, or a row's label for few logits, or
    twice, from the cache.
    """
    tensors = {"softmax_whole": 2, "softmax_chunks": 2, "map_whole": 3, "map_chunks": 3}
    tensors["gradient"] = 2
    seen = set()
    for launch in launches(monkeypatch, function, {"shape": shape, "dtype": dtype}):
        compiled = launch.compiled(90, False, tmp_path)
        if compiled.kernel in shares:
            seen.add(compiled.kernel)
            moved = tensors.get(compiled.kernel, 1) * dtype.itemsize
            share = launch.lanes(compiled, shape[1]) / (LANES_A_BYTE * moved)
            print(f"{compiled.kernel} {shape} {dtype}: {share:.2f}")
            assert share <= shares[compiled.kernel], compiled._replace(listing="")
    assert seen == shares.keys()


def test_rows_between_two_vectors_are_written_a_vector_at_a_time(monkeypatch, tmp_path: Path):
    """But for their ends, which a branch of their own reads and writes number by number."""
    kept = launches(monkeypatch, cross_entropy, {"shape": (2, 50257), "dtype": BF16})
    (launch,) = [x for x in kept if x.kernel.__name__ == "gradient"]
    listing = launch.compiled(90, False, tmp_path).listing
    # in the order of the code: a jump over the ends lies between the two
    accesses = re.findall(r"BRA|LDG\.E\.128|LDG\.E\.U16|STG\.E\.128|STG\.E\.U16", listing)
    for wide, narrow in (("LDG.E.128", "LDG.E.U16"), ("STG.E.128", "STG.E.U16")):
        first, ends = accesses.index(wide), accesses.index(narrow)
        assert first < ends
        assert "BRA" in accesses[first:ends]
        assert accesses.count(narrow) == 8 * accesses.count(wide)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 131072), (1, 1000, 8, 8)], ids=str)  # of several threads
@pytest.mark.parametrize("function", [softmax, maps])
@pytest.mark.parametrize("architecture", TARGETS.values(), ids=TARGETS)
def test_a_chunks_sums_are_announced_once_all_threads_have_written_them(
    monkeypatch, tmp_path: Path, architecture, function, shape, dtype
):
    """And read once they are all there; by PTX's memory model both need a barrier beside them."""
    for launch in launches(monkeypatch, function, {"shape": shape, "dtype": dtype}):
        if not launch.kernel.__name__.endswith("_chunks"):
            continue
        launch.compiled(architecture, False, tmp_path)
        ptx = (tmp_path / "kernel.ptx").read_text()
        steps = {
            r"atom\.global\.gpu\.relaxed": "D",  # the number is drawn
            r"ld\.global\.(?:v\d\.)?[bf]\d+": "r",
            r"st\.global\.(?:v\d\.)?[bf]\d+": "w",
            r"bar(?:rier\.cta)?\.sync": "|",
            r"atom\.global\.gpu\.release": "R",
            r"(?:atom|ld)\.global\.gpu\.acquire": "A",
        }
        found = re.finditer("|".join(f"({pattern})" for pattern in steps), ptx)
        order = "".join(list(steps.values())[m.lastindex - 1] for m in found)
        # the logits, their sums; the sums of the row and the logits, the results
        assert re.fullmatch(r"\|*D\|+r[r|]*w[w|]*\|R\|*A\|+r[r|]*w[w|]*", order), order


def test_no_kernel_is_left_out(monkeypatch):
    cases = [*CALLS.values(), *ONCE.values()]
    seen = {x.kernel.__name__ for case in cases for x in launches(monkeypatch, *case)}
    assert seen == {
        "cleared",
        "cross_entropy_combined",
        "cross_entropy_partial",
        "cross_entropy_whole",
        "finished",
        "gradient",
        "hessian_chunks",
        "hessian_partial",
        "hessian_whole",
        "labels_looked_at",
        "map_chunks",
        "map_whole",
        "mass_partial",
        "softmax_chunks",
        "softmax_whole",
    }


def test_a_launch_like_an_earlier_one_takes_its_kernel(monkeypatch):
    """Whatever Triton would look at: sizes, options, types, and where memory begins."""
    found: list[str] = []
    again: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            assert grid == (1, 1, 1)
            return lambda *args: again.append(args)

    def run(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Kernel:
        assert len(args) == len(fn.arg_names)
        assert kwargs == {"num_warps": 4}
        found.append(args)
        return Kernel()

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launching, "_launched", {})
    memory = torch.zeros(4 * 10 + 1)
    z = memory[:40].view(4, 10)
    ops.direct.softmax(z, 1, False)
    ops.direct.softmax(z.clone(), 1, False)
    assert (len(found), len(again)) == (1, 1)
    assert [type(x) for x in found[0]] == [type(x) for x in again[0]]
    assert found[0][2:] == again[0][2:]  # behind the tensors
    for other in (
        (memory[1:].view(4, 10), 1, False),  # not at a multiple of 16
        (z, 1, True),
        (z[:3], 1, False),
        (z.bfloat16(), 1, False),
        (torch.zeros(4, 16)[:, :10], 1, False),
    ):
        ops.direct.softmax(*other)
    assert (len(found), len(again)) == (6, 1)
    ops.direct.softmax(z, 1, False)
    assert (len(found), len(again)) == (6, 2)


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "On", "yes", "y", "0", "", "t", "2"])
def test_the_interpreter_is_wanted_as_triton_reads_it(monkeypatch, value):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert face.wants_interpreter() == triton.knobs.runtime.interpret
