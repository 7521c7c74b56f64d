"""`kiloq doctor`: what this machine can do, and known traps. Only looks; a package that fails to load is a finding."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from kiloq import __version__
from kiloq.cli.options import Json

GIB = 2**30
TORCH_RANGE = ((2, 11), (2, 16))  # as pyproject.toml has it
# Instruction sets that the arithmetic can use, best last.
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
REQUIRED = ("numpy", "safetensors", "tiktoken", "huggingface_hub", "cyclopts", "rich", "prompt_toolkit")
OPTIONAL = {  # package: what it is for
    "tokenizers": "training vocabularies: pip install 'kiloq[tokenizer]'",
    "tensorboard": "training curves: pip install 'kiloq[train]'",
    "matplotlib": "plots: pip install 'kiloq[train]'",
    "pyarrow": "training data in Parquet: pip install 'kiloq[parquet]'",
    "modelscope": "the ModelScope hub: pip install 'kiloq[modelscope]'",
}


@dataclass(frozen=True)
class Finding:
    """One fact about the machine; a note is worth knowing, a problem keeps something from working."""

    topic: str
    text: str
    status: Literal["ok", "note", "problem"] = "ok"


def doctor(*, json_: Json = False) -> int:
    """What this machine can do, and what stands in its way."""
    findings = list(examine())
    if json_:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=1))
    else:
        marks = {"ok": " ", "note": "-", "problem": "!"}
        for finding in findings:
            print(f"{marks[finding.status]} {finding.topic:<10} {finding.text}")
    return int(any(finding.status == "problem" for finding in findings))


def examine() -> Iterator[Finding]:
    """Every finding, cheap ones first."""
    yield Finding("kiloq", f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield from examine_processor()
    yield from examine_memory()
    yield from examine_torch()
    yield from examine_kernels()
    yield from examine_companions(installed_version("torch") or "")
    yield from examine_packages()
    yield from examine_bundled_model()
    yield from examine_environment()
    yield from examine_load(os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)


def examine_processor() -> Iterator[Finding]:
    name, flags = processor()
    yield Finding("processor", f"{name}, {usable_cores()} of {os.cpu_count()} cores usable")
    known = [flag for flag in CPU_FLAGS if flag in flags]
    if known:
        yield Finding("processor", f"has {' '.join(known)}")
    elif platform.machine() in ("x86_64", "AMD64"):
        yield Finding("processor", "has no AVX2: arithmetic takes the slow, portable path", "note")


def examine_memory() -> Iterator[Finding]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system counts its pages
        return
    limit = Path("/sys/fs/cgroup/memory.max")
    bound = limit.read_text().strip() if limit.is_file() else "max"
    container = "" if bound == "max" else f", this container may use {int(bound) / GIB:.1f}"
    yield Finding("memory", f"{total / GIB:.1f} GiB, {free / GIB:.1f} free{container}")
    yield Finding("disk", f"{shutil.disk_usage(Path.home()).free / GIB:.1f} GiB free at {Path.home()}")


def examine_torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken build raises anything from ImportError to OSError
        yield Finding("torch", f"cannot be imported: {error}. Install it: pip install torch==2.13.0", "problem")
        return
    version = str(torch.__version__)
    low, high = TORCH_RANGE
    found = tuple(int(part) for part in version.split(".")[:2])
    fits = low <= found < high
    wanted = "" if fits else f"; kiloq wants {low[0]}.{low[1]} up to, not including, {high[0]}.{high[1]}"
    yield Finding("torch", f"{version}, {torch.get_num_threads()} threads{wanted}", "ok" if fits else "problem")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield Finding(
                "cuda", f"{card.name}, {card.total_memory / GIB:.1f} GiB, capability {card.major}.{card.minor}"
            )
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "cuda", "an NVIDIA card is here, but this torch cannot use it; install a CUDA build of torch", "problem"
        )
    else:
        yield Finding("cuda", "no card; everything runs on the processor")


def examine_kernels() -> Iterator[Finding]:
    """Which code multiplies packed weights, and how to get a better one."""
    try:
        from kiloq.errors import KiloqError
        from kiloq.ops import cpu
    except Exception:  # torch cannot be imported, which has been told
        return
    try:
        chosen = cpu.active()
    except KiloqError as error:
        yield Finding("kernels", str(error), "problem")
        return
    if chosen.library is not None:
        others = ", ".join(name for name in cpu.available() if name != chosen.name)
        text = (
            f"{chosen.name} ({chosen.why}), {chosen.library.kq_threads()} threads; KILOQ_BACKEND can ask for {others}"
        )
        yield Finding("kernels", text)
        return
    text = f"none: PyTorch computes, several times slower, because {chosen.why}"
    if os.environ.get("KILOQ_BACKEND"):
        yield Finding("kernels", f"{text}; unset it to have the best", "note")
        return
    if chosen.is_built or sys.platform != "linux" or platform.machine() != "x86_64":
        yield Finding("kernels", f"{text}; there are kernels for Linux on x86-64 processors with AVX2", "note")
        return
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    wanted = "" if compiler else "install a C++ compiler (Debian, Ubuntu: apt install g++), then "
    remedy = f"{wanted}install kiloq again: pip install --force-reinstall --no-deps . (-e . for a working copy)"
    yield Finding("kernels", f"{text}; {remedy}", "note")


def examine_companions(torch_version: str) -> Iterator[Finding]:
    """Packages built against one exact torch: another build of them breaks every library that imports them."""
    release, _, build = torch_version.partition("+")
    for name in ("torchvision", "torchaudio"):
        version = installed_version(name)
        if version is None:
            continue
        wanted = next((r.partition("==")[2] for r in metadata.requires(name) or () if r.startswith("torch==")), release)
        if wanted.partition("+")[0] != release or version.partition("+")[2] != build:
            text = (
                f"{name} {version} was built for another torch than {torch_version}: importing it fails, and so does "
                f"what imports it. kiloq does not need it: pip uninstall {name}"
            )
            yield Finding("trap", text, "problem")
    cuda_packages = [
        d.name for d in metadata.distributions() if d.name and d.name.lower().startswith(("nvidia-", "nvidia_"))
    ]
    if build == "cpu" and cuda_packages:
        text = f"{len(cuda_packages)} CUDA packages (nvidia-*) are installed, but torch is a CPU build and uses none"
        yield Finding("trap", text, "note")


def examine_packages() -> Iterator[Finding]:
    for name in REQUIRED:
        version = installed_version(name)
        status: Literal["ok", "problem"] = "ok" if version else "problem"
        yield Finding("package", f"{name} {version or 'is missing: pip install kiloq'}", status)
    for name, purpose in OPTIONAL.items():
        yield Finding("optional", f"{name} {installed_version(name) or f'is not installed ({purpose})'}")


def examine_bundled_model() -> Iterator[Finding]:
    from kiloq.checkpoint.hub import bundled
    from kiloq.errors import KiloqError

    try:
        yield Finding("model", f"{bundled().name} is at {bundled()}")
    except KiloqError as error:
        yield Finding("model", str(error), "problem")


def examine_environment() -> Iterator[Finding]:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > usable_cores():
        text = f"OMP_NUM_THREADS is {threads} on {usable_cores()} usable cores: threads will wait for each other"
        yield Finding("trap", text, "note")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Finding("trap", "HF_HUB_OFFLINE is set: only models that are already here can be used", "note")
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    if encoding != "utf8":
        yield Finding("trap", f"the terminal speaks {encoding}, not UTF-8; set LANG=C.UTF-8 for Chinese text", "note")


def examine_load(load: float) -> Iterator[Finding]:
    """Threads of one step wait for the slowest by spinning, which is best on free cores and ruinous on busy ones."""
    if load > usable_cores():
        text = f"the load is {load:.1f} on {usable_cores()} usable cores; on a machine that stays this busy, "
        yield Finding(
            "trap", f"{text}OMP_WAIT_POLICY=PASSIVE (or OMP_NUM_THREADS=1) keeps threads out of the way", "note"
        )


def processor() -> tuple[str, frozenset[str]]:
    """The processor's name and feature flags, where the system tells them."""
    listing = Path("/proc/cpuinfo")
    rows = listing.read_text(errors="replace").splitlines() if listing.is_file() else []
    facts = {key.strip(): value.strip() for key, colon, value in (row.partition(":") for row in rows) if colon}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, frozenset((facts.get("flags") or facts.get("Features") or "").split())


def usable_cores() -> int:
    """Cores this process may run on, which containers and `taskset` limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
