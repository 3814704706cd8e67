"""`python -m fsam_ext.info`: the right backend, the reasons, the exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fsam_ext import __version__, _library, backends, info


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv("FSAM_BACKEND", raising=False)


def rows(text: str) -> dict[str, str]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("backend"))
    return {line.split()[0]: line for line in lines[start + 1 : start + 1 + len(backends.CANDIDATES)]}


def test_every_candidate_has_a_row_with_its_reason():
    table = rows(info.describe("cpu"))
    assert list(table) == list(backends.CANDIDATES)
    for name, candidate in backends.CANDIDATES.items():
        reason = candidate(torch.device("cpu"))[1]
        assert reason is None or f"no      {reason}" in table[name]


def test_the_one_in_use_is_the_one_that_resolve_takes(monkeypatch):
    for broken in range(len(backends.CANDIDATES)):
        in_use = [name for name, row in rows(info.describe("cpu")).items() if "  in use  " in row]
        expected = next(n for n, candidate in backends.CANDIDATES.items() if candidate(torch.device("cpu"))[1] is None)
        assert in_use == [expected], broken
        if expected == "reference":
            break
        monkeypatch.setitem(backends.CANDIDATES, expected, lambda device: (None, "broken for this test"))
        assert "broken for this test" in rows(info.describe("cpu"))[expected]


@pytest.mark.skipif(_library.CPU_REASON is not None, reason=str(_library.CPU_REASON))
def test_it_tells_the_instruction_set():
    assert torch.ops.fsam_ext.cpu_isa() in rows(info.describe("cpu"))["cpu"]


def test_the_reference_serves_a_gpu_only_where_it_is_asked_for(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(info, "_missing", lambda device: None)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends.CANDIDATES, name, lambda device: (None, "broken for this test"))
    text, serves = info.report(gpu)
    assert not serves and "can" in rows(text)["reference"] and "backend='reference'" in rows(text)["reference"]
    monkeypatch.setenv("FSAM_BACKEND", "reference")
    assert info.report(gpu)[1]


def test_a_wish_in_the_environment_is_followed(monkeypatch):
    monkeypatch.setenv("FSAM_BACKEND", "reference")
    table = rows(info.describe("cpu"))
    assert "in use" in table["reference"] and "FSAM_BACKEND asks for it" in table["reference"]
    assert not any("in use" in row for name, row in table.items() if name != "reference")


def test_a_wish_that_cannot_be_met_serves_nothing(monkeypatch, capsys):
    monkeypatch.setenv("FSAM_BACKEND", "nonsense")
    assert info.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FSAM_BACKEND=nonsense names no backend" in printed and "No backend serves cpu" in printed


def test_it_says_how_to_get_what_is_missing(monkeypatch, tmp_path):
    kernels, library = "The compiled kernels are missing: install g++", "The CUDA library is missing: install a CUDA"
    there = info.describe("cpu")
    assert "missing" not in there
    monkeypatch.setattr(_library, "LIBRARY_DIR", tmp_path)
    assert kernels in info.describe("cpu") and library not in info.describe("cpu")
    assert (
        kernels in info.describe("cuda") and library in info.describe("cuda") and "nvcc 12.1" in info.describe("cuda")
    )
    (tmp_path / "_C.abi3.so").touch()
    assert "missing" not in info.describe("cpu")
    assert kernels not in info.describe("cuda") and library in info.describe("cuda")


def test_versions_head_the_table():
    first = info.describe("cpu").splitlines()[0]
    assert __version__ in first and torch.__version__ in first and "cpu" in first


def test_exit_status_of_the_program():
    command = [sys.executable, "-m", "fsam_ext.info", "--device"]
    served = subprocess.run([*command, "cpu"], text=True, capture_output=True)
    assert served.returncode == 0 and "cpu is served by" in served.stdout, served.stderr
    nothing = subprocess.run([*command, "cuda:99"], text=True, capture_output=True)
    assert nothing.returncode == 1 and "No backend serves cuda:99" in nothing.stdout, nothing.stderr


def test_a_device_that_does_not_exist_says_so():
    text, serves = info.report(torch.device("cuda", 99))
    assert not serves
    for row in rows(text).values():
        assert "devices of type 'cuda'" in row


def test_a_name_that_is_no_device(capsys):
    with pytest.raises(SystemExit) as exited:
        info.main(["--device", "abacus"])
    assert exited.value.code == 2
    assert "--device abacus is no device" in capsys.readouterr().err


def test_without_a_name_it_is_the_machine_s_accelerator(capsys):
    status = info.main([])
    expected = "cpu" if not torch.accelerator.is_available() else torch.accelerator.current_accelerator().type
    assert status == 0 and f"device {expected}" in capsys.readouterr().out
