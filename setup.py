"""Builds the CPU kernels of csrc/ into kiloq/ops/_native.so: a plain C library that the package loads through ctypes.

It is no Python extension, so it needs no Python headers and fits every interpreter. Where there is no C++ compiler, or
the processor is none that we have kernels for, the package installs without it and computes in PyTorch.
"""

import os
import platform
import shlex
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python asks for symbols, which made the library eleven times as large
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
]
MORE = shlex.split(os.environ.get("KILOQ_CXXFLAGS", ""))  # sanitizers, for `make native-check`
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
FLAGS = {
    "kernels_avx2.cpp": AVX2,
    "kernels_avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "kernels_avx512.cpp": AVX512,
    "kernels_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


class BuildKernels(build_ext):
    """Compiles each file for its own instruction set; which of them runs is chosen at run time."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if not self.knows(("-std=c++17",)):
            raise CompileError("there is no C++17 compiler: kiloq will compute in PyTorch, several times slower")
        with ThreadPoolExecutor() as pool:
            made = list(pool.map(lambda source: self.compile_one(source, ext.depends), ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(made, str(target), extra_postargs=["-pthread", *MORE], target_lang="c++")

    def compile_one(self, source: str, depends: list[str]) -> str:
        """The object of one file. Where the compiler is too old for its instruction set, the file gives no kernels."""
        known = FLAGS.get(Path(source).name, [])
        if not self.knows(tuple(known)):
            print(f"kiloq: this compiler does not know {' '.join(known)}; doing without", file=sys.stderr)
            known = []
        flags = [*COMMON, *known, *MORE]
        return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags, depends=depends)[0]

    def knows(self, flags: tuple[str, ...]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            empty = Path(folder, "empty.cpp")
            empty.write_text("")
            try:
                self.compiler.compile([str(empty)], output_dir=folder, extra_postargs=list(flags))
            except CompileError:
                return False
        return True


def kernels() -> list[Extension]:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
    headers = sorted(str(path) for pattern in ("*.h", "*.inc") for path in CSRC.glob(pattern))
    return [Extension("kiloq.ops._native", sources, depends=headers, language="c++", optional=True)]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
