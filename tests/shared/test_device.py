import warnings
from pathlib import Path

import pytest
import torch

from residual_saes.shared import device as module
from residual_saes.shared.device import announce, pick_device, send
from residual_saes.shared.errors import UserError

TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver "
    "by downloading and installing a new version. (Triggered internally at CUDAFunctions.cpp:119.)"
)


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(module, "_DRIVER", Path("/nowhere"))
    monkeypatch.setattr(module.shutil, "which", lambda name: None)


def refusal(name: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_driver_that_is_too_old_is_no_silent_cpu(without_cuda: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unavailable() -> bool:
        warnings.warn(TOO_OLD, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(module, "_DRIVER", tmp_path)
    message = refusal()
    assert "The NVIDIA driver on your system is too old (found version 11040)" in message
    assert "Triggered" not in message and "--device cpu" in message and "update the driver" in message
    assert "too old (found version 11040)" in refusal("cuda")
    assert pick_device("cpu").type == "cpu"


def test_a_torch_without_cuda_beside_a_driver_is_no_silent_cpu(without_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert f"torch {torch.__version__} is built without CUDA" in refusal()
    assert pick_device("cpu").type == "cpu"


def test_where_there_is_no_driver_the_cpu_it_is(without_cuda: None, capsys: pytest.CaptureFixture[str]) -> None:
    device = pick_device(None)
    assert device.type == "cpu"
    assert capsys.readouterr().err == ""
    torch.set_num_threads(2)
    announce(device)
    assert capsys.readouterr().err == "device: cpu, threads: 2\n"


def test_what_is_not_there_is_said(without_cuda: None) -> None:
    assert "no CUDA device is available here (torch" in refusal("cuda")
    assert "'abacus' is not a device for this" in refusal("abacus")


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    announce(pick_device(None))
    assert capsys.readouterr().err == "device: cuda, NVIDIA H100 80GB HBM3\n"
    assert "cuda:1 does not exist: there are 1 CUDA devices" in refusal("cuda:1")


def test_on_a_cpu_nothing_is_sent() -> None:
    x = torch.arange(3)
    assert send(x, torch.device("cpu")) is x
