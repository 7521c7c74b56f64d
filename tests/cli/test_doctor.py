"""`kiloq doctor` tells what is there, and recognises the traps that it knows."""

import json
from pathlib import Path

import pytest

from kiloq.cli.doctor import (
    Finding,
    examine_companions,
    examine_environment,
    examine_kernels,
    examine_load,
    usable_cores,
)
from kiloq.cli.main import run
from kiloq.ops import cpu


def install(folder: Path, name: str, version: str, requires: str) -> None:
    """A package as the metadata of an environment shows it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {requires}\n"
    )


def test_the_findings_cover_the_machine_and_are_data_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert {"python", "processor", "memory", "torch", "cuda", "package", "optional"} <= {
        row["topic"] for row in findings
    }
    code = run(["doctor"])
    shown = capsys.readouterr().out
    assert all(row["text"].splitlines()[0] in shown for row in findings if row["topic"] in ("python", "package"))
    assert code == int(any(row["status"] == "problem" for row in findings))


@pytest.mark.parametrize(
    ("torch", "vision", "requires", "trapped"),
    [
        ("2.13.0+cpu", "0.28.0+cpu", "torch==2.13.0", False),
        ("2.13.0", "0.28.0", "torch==2.13.0", False),
        ("2.13.0+cpu", "0.28.0", "torch==2.13.0", True),
        ("2.13.0+cpu", "0.28.0+cu130", "torch==2.13.0", True),
        ("2.13.0+cpu", "0.27.0+cpu", "torch==2.12.0", True),
    ],
)
def test_torchvision_of_another_torch_is_a_problem(
    torch: str, vision: str, requires: str, trapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "torchvision", vision, requires)
    monkeypatch.syspath_prepend(tmp_path)
    found = [finding for finding in examine_companions(torch) if "torchvision" in finding.text]
    assert [finding.status for finding in found] == ["problem"] * trapped


def test_cuda_packages_beside_a_cpu_torch_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "nvidia_cublas", "13.0", "x")
    monkeypatch.syspath_prepend(tmp_path)
    assert any("nvidia-*" in finding.text for finding in examine_companions("2.13.0+cpu"))


def test_more_threads_than_cores_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(usable_cores() + 1))
    assert any("OMP_NUM_THREADS" in finding.text for finding in examine_environment())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not any("OMP_NUM_THREADS" in finding.text for finding in examine_environment())


def test_a_busy_machine_is_noted() -> None:
    assert not list(examine_load(0.5 * usable_cores()))
    assert [finding.status for finding in examine_load(2.0 * usable_cores())] == ["note"]


def kernels(monkeypatch: pytest.MonkeyPatch, asked: str, library: Path) -> Finding:
    """What doctor says of the kernels in a process that starts afresh."""
    monkeypatch.setattr(cpu, "_chosen", cpu._Chosen())
    monkeypatch.setattr(cpu, "LIBRARY", library)
    monkeypatch.setenv("KILOQ_BACKEND", asked)
    (found,) = examine_kernels()
    return found


def test_the_backend_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "_native.so"
    asked = kernels(monkeypatch, "reference", missing)
    assert (asked.status, "KILOQ_BACKEND asks for it" in asked.text) == ("note", True)
    wrong = kernels(monkeypatch, "sse", missing)
    assert (wrong.status, "amx, avx512" in wrong.text) == ("problem", True)
    absent = kernels(monkeypatch, "", missing)
    assert (absent.status, "not built" in absent.text) == ("note", True)


def test_kernels_that_were_built_are_shown_with_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.library() is None:
        pytest.skip("no kernels here")
    best = cpu.available()[0]
    assert best in kernels(monkeypatch, "", cpu.LIBRARY).text
    assert f"{cpu.library().kq_threads()} threads" in kernels(monkeypatch, best, cpu.LIBRARY).text
