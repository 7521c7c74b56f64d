"""Makes what run.py needs: a venv for each runtime, from PyPI with pinned versions, and its model files.

python benchmarks/peers/setup.py --work FOLDER [--shapes qwen-1.8b,qwen2.5-0.5b] [--no-amx]
What is there already is kept. Takes about half an hour on two cores and 12 GB of disk for both shapes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import venv
from dataclasses import asdict
from pathlib import Path

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
CMAKE_ARGS = {"llama": _NATIVE, "llama-noamx": _NO_AMX}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shapes", default="qwen-1.8b,qwen2.5-0.5b")
    parser.add_argument("--no-amx", action="store_true", help="also llama.cpp without the matrix unit")
    options = parser.parse_args()
    work = options.work.resolve()
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
