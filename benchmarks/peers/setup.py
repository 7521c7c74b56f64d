"""Makes what run.py needs: a venv for each runtime, from PyPI with pinned versions, and its model files.

python benchmarks/peers/setup.py --work FOLDER [--shapes qwen-1.8b,qwen2.5-0.5b] [--no-amx]
python benchmarks/peers/setup.py --work FOLDER --serve       # instead: the servers that serve.py compares
What is there already is kept. Takes about half an hour on two cores and 12 GB of disk for both shapes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import venv
from dataclasses import asdict
from pathlib import Path

from kiloq.bench.random_checkpoint import write_random_checkpoint
from kiloq.bench.shapes import shape_config

HERE = Path(__file__).parent
LLAMA = ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"]
# torchvision, which optimum-intel asks for and does not need here, would bring CUDA libraries along: hence --no-deps.
STEPS: dict[str, list[list[str]]] = {
    "llama": [["--no-binary", "llama-cpp-python", "--no-cache-dir", *LLAMA]],
    "llama-noamx": [["--no-binary", "llama-cpp-python", "--no-cache-dir", *LLAMA]],
    "openvino": [["openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"]],
    "hf": [["torch==2.13.0"], ["transformers==5.23.0", "numpy==2.4.6"]],
    "export": [
        ["torch==2.13.0"],
        ["--no-deps", "optimum-intel==2.2.0", "optimum==2.3.0"],
        ["torch==2.13.0", "nncf==3.4.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"],
        ["torch==2.13.0", "transformers==5.5.4", "accelerate", "requests", "safetensors"],
    ],
}
# gcc 12 drops the stores to the tile configuration that llama.cpp hands to ldtilecfg, which then faults.
_NATIVE = "-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"
_NO_AMX = "-DGGML_NATIVE=OFF " + " ".join(
    f"-DGGML_{name}=ON"
    for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI")
)
# llama-server comes with the sources of llama-cpp-python.
SERVER_CMAKE = [
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse"),
    *("-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"),
    *("-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
]
SERVER_PACKAGES = {
    "llama": ["uvicorn", "fastapi", "sse-starlette", "starlette-context", "pydantic-settings"],
    "hf": ["torch==2.13.0", "transformers[serving]==5.23.0"],
}
CMAKE_ARGS = {"llama": _NATIVE, "llama-noamx": _NO_AMX}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shapes", default="qwen-1.8b,qwen2.5-0.5b")
    parser.add_argument("--no-amx", action="store_true", help="also llama.cpp without the matrix unit")
    parser.add_argument("--serve", action="store_true", help="llama-server, transformers serve and their models only")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.serve:
        make_servers(work, options.shapes.split(",")[-1])
        return
    for name in STEPS:
        if name != "llama-noamx" or options.no_amx:
            make_venv(work, name)
    for shape in options.shapes.split(","):
        make_models(work, shape)


def make_venv(work: Path, name: str) -> None:
    done = work / name / ".made"
    if done.exists():
        return
    print(f"{name}: installing", flush=True)
    venv.create(work / name, with_pip=True, clear=True)
    environment = {**os.environ, "CMAKE_ARGS": CMAKE_ARGS.get(name, "")}
    for packages in STEPS[name]:
        call([python_of(work, name), "-m", "pip", "install", "-q", *packages], environment)
    done.touch()


def make_models(work: Path, shape: str) -> None:
    models = work / "models"
    models.mkdir(exist_ok=True)
    described = models / f"{shape}.json"
    described.write_text(json.dumps(describe(shape)))
    for kind in ("Q4_0", "Q8_0"):
        file = models / f"{shape}-{kind}.gguf"
        if not file.exists():
            print(f"{file.name}: writing", flush=True)
            call([python_of(work, "llama"), HERE / "make_gguf.py", described, file, kind])
    for kind in ("int4", "int8"):
        folder = models / f"{shape}-ov-{kind}"
        if not (folder / "openvino_model.bin").exists():
            print(f"{folder.name}: writing", flush=True)
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
            call([python_of(work, "export"), HERE / "export_openvino.py", described, folder, kind], offline)


def make_servers(work: Path, shape: str) -> None:
    """Twenty minutes on two cores, nearly all of it compiling, and 5 GB."""
    for name, packages in SERVER_PACKAGES.items():
        make_venv(work, name)
        call([python_of(work, name), "-m", "pip", "install", "-q", *packages])
    make_llama_server(work)
    models = work / "models"
    models.mkdir(exist_ok=True)
    described = models / f"{shape}.json"
    described.write_text(json.dumps(describe(shape)))
    ours, hf, file = models / f"{shape}-serve", models / f"{shape}-hf", models / f"{shape}-serve-Q4_0.gguf"
    if not ours.exists():
        write_random_checkpoint(ours, shape)
    if not hf.exists():  # the same files; without an id that ends answers, all are as long as asked for
        hf.mkdir()
        for source in ours.glob("[!.]*"):
            (hf / source.name).symlink_to(source)
        (hf / "generation_config.json").unlink()
        (hf / "generation_config.json").write_text('{"do_sample": false}\n')
    if not file.exists():
        print(f"{file.name}: writing", flush=True)
        call([python_of(work, "llama"), HERE / "make_gguf.py", described, file, "Q4_0", ours])


def make_llama_server(work: Path) -> None:
    if (work / "llama-server/bin/llama-server").exists():
        return
    print("llama-server: compiling", flush=True)
    sources = work / "src"
    pip = [python_of(work, "llama"), "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
    call([*pip, "-d", sources, LLAMA[0]])
    (archive,) = sources.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(sources, filter="data")
    vendored = archive.with_suffix("").with_suffix("") / "vendor/llama.cpp"
    call(["cmake", "-S", vendored, "-B", work / "llama-server", *SERVER_CMAKE])
    call(["cmake", "--build", work / "llama-server", "--target", "llama-server", "-j", str(os.cpu_count())])


def describe(shape: str) -> dict[str, object]:
    """What the other runtimes' scripts, which cannot import kiloq, must know of a shape. v1's has Qwen2's layout."""
    config = shape_config(shape)
    if config.qk_norm:
        sys.exit(f"{shape}: these scripts write Qwen2 models only; name a v1 or 2.5 shape.")
    facts = asdict(config)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    kept = {name: facts[name] for name in (*names, "qkv_bias", "tie_embeddings")}
    return {"name": shape, **kept, "rope_theta": config.rope.theta}


def python_of(work: Path, name: str) -> Path:
    return work / name / "bin" / "python"


def call(command: list[str | Path], environment: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    if subprocess.run(words, env=environment, check=False).returncode:
        sys.exit(f"failed: {shlex.join(words)}")


if __name__ == "__main__":
    main()
