"""Times the packed matrix products of any backend against the memory bandwidth measured in the same run.

python benchmarks/kernels.py [--backend avx512] [--kinds int4,int8] [--rows 1,2,4] [--shapes 4096x11008] [--json FILE]
Weights lie cold: every call takes the next of enough copies that no cache holds them all. The table shows the fastest
call and the median one; GB/s and GOPS are of the fastest.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kiloq.ops import PackedWeight, QuantWeight, cpu

COLD_BYTES = 600 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    backend: str
    kind: str
    shape: str
    rows: int
    ms: float  # fastest
    median_ms: float
    gb_s: float
    gops: float
    of_bandwidth: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="", help="amx, avx512, avxvnni or avx2; else the best")
    parser.add_argument("--kinds", default="int4,int8,bf16", help="int4 or int4:GROUP, int8, bf16")
    parser.add_argument("--rows", default="1,2,4,8,16,32,128,512")
    parser.add_argument("--shapes", default="4096x11008,2048x5504,896x4864", help="K x N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="for each line")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with cpu.using(options.backend or cpu.active().name):
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    library = cpu.library()
    assert library is not None
    library.kq_set_threads(options.threads)
    bandwidth = measure_bandwidth(library)
    print(f"{cpu.active().name}, {options.threads} threads, memory reads at {bandwidth:.1f} GB/s")
    print("kind      K x N            M       ms   median    GB/s     GOPS  of bandwidth")
    table = []
    for shape in options.shapes.split(","):
        columns, rows = map(int, shape.split("x"))
        for kind in options.kinds.split(","):
            copies = make_copies(kind, rows, columns)
            for count in map(int, options.rows.split(",")):
                row = measure(library, copies, count, options.seconds)
                row = replace(row, kind=kind, shape=shape, of_bandwidth=row.gb_s / bandwidth)
                table.append(row)
                print(
                    f"{kind:9s} {shape:14s} {count:4d} {row.ms:8.3f} {row.median_ms:8.3f} {row.gb_s:7.1f} "
                    f"{row.gops:8.0f}  {row.of_bandwidth:6.1%}",
                    flush=True,
                )
    after = measure_bandwidth(library)
    print(f"memory reads at {after:.1f} GB/s afterwards")
    if options.json:
        record = {"bandwidth": bandwidth, "bandwidth_after": after, "threads": options.threads}
        options.json.write_text(json.dumps({**record, "table": [asdict(row) for row in table]}, indent=1) + "\n")


def measure_bandwidth(library: ctypes.CDLL) -> float:
    data = cpu.aligned_bytes(COLD_BYTES).fill_(1)
    return COLD_BYTES / min(repeat(lambda: library.kq_read(data.data_ptr(), COLD_BYTES), 0.5)) / 1e9


def make_copies(kind: str, rows: int, columns: int) -> list[PackedWeight]:
    packed = cpu.pack(random_weight(kind, rows, columns), None)
    needed = max(2, -(-COLD_BYTES // packed.nbytes))
    copies = [packed]
    for _ in range(needed - 1):
        data = cpu.aligned_bytes(packed.nbytes)
        data.copy_(packed.data)
        copies.append(replace(packed, data=data))
    return copies


def random_weight(kind: str, rows: int, columns: int) -> QuantWeight | torch.Tensor:
    if kind == "bf16":
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_()
    if kind == "int8":
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return QuantWeight(kind="int8", group_size=columns, codes=codes, scales=torch.full((rows, 1), 0.01))
    group_size = int(kind.partition(":")[2] or 128)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scales = torch.full((rows, columns // group_size), 0.01)
    return QuantWeight(kind="int4", group_size=group_size, codes=codes, scales=scales)


def measure(library: ctypes.CDLL, copies: list[PackedWeight], count: int, seconds: float) -> Row:
    first = copies[0]
    x, y = torch.randn(count, first.columns), torch.empty(count, first.rows)
    structs = [ctypes.byref(cpu.weight_struct(copy)) for copy in copies]
    turn = 0

    def multiply() -> None:
        nonlocal turn
        turn = (turn + 1) % len(structs)
        library.kq_linear(structs[turn], x.data_ptr(), first.columns, count, y.data_ptr(), first.rows, 0)

    times = repeat(multiply, seconds)
    best = min(times)
    return Row(
        backend=cpu.active().name,
        kind="",
        shape="",
        rows=count,
        ms=best * 1e3,
        median_ms=statistics.median(times) * 1e3,
        gb_s=first.nbytes / best / 1e9,
        gops=2 * count * first.rows * first.columns / best / 1e9,
        of_bandwidth=0,
    )


def repeat(work: Callable[[], object], seconds: float) -> list[float]:
    """The seconds of each call, after one that warms up."""
    work()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
