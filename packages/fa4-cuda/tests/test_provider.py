"""What the registry is told about this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fa4_cuda
import flash_attention_registry as registry
from fa4_cuda import library, provider
from flash_attention_registry import CudaNeededError
from flash_attention_registry.cuda import without_cuda


@pytest.fixture(autouse=True)
def _clean(flash_attention_registry_reset: Any) -> None:
    """Every test leaves the registry as it found it."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give a function that puts GPUs of some compute capabilities into this machine."""

    def put(*capabilities: tuple[int, int], driver: int = 13000) -> None:
        class Library:
            @staticmethod
            def fa4_torch_find() -> None:
                return None

            @staticmethod
            def fa4_driver_version(found: Any, runtime: Any) -> int:
                found._obj.value, runtime._obj.value = driver, 13000
                return 0

        monkeypatch.setattr(library, "load", Library)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)

    return put


def test_it_is_available_and_recommended_on_hopper(machine: Callable[..., None]) -> None:
    machine((9, 0))
    assert provider.why_unavailable() is None
    assert provider.why_not_recommended() is None


def test_one_hopper_among_others_is_enough(machine: Callable[..., None]) -> None:
    machine((8, 0), (9, 0))
    assert provider.why_unavailable() is None


@pytest.mark.parametrize(
    ("capabilities", "found"),
    [([(8, 6)], "8.6"), ([(10, 0)], "10.0"), ([(8, 9), (8, 0), (8, 9)], "8.0, 8.9")],
)
def test_another_architecture_is_named(
    machine: Callable[..., None], capabilities: list[tuple[int, int]], found: str
) -> None:
    machine(*capabilities)
    assert provider.why_unavailable() == (
        f"needs compute capability 9.0, found {found}; on such GPUs the family FA4 goes on to "
        "fa4-triton"
    )


def test_an_old_driver_is_a_reason_and_no_crash(machine: Callable[..., None]) -> None:
    machine((9, 0), driver=12080)
    reason = provider.why_unavailable()
    assert reason is not None
    assert reason.startswith("the NVIDIA driver is made for CUDA 12, and the kernels are built")


def test_a_newer_driver_is_fine(machine: Callable[..., None]) -> None:
    machine((9, 0), driver=14010)
    assert provider.why_unavailable() is None


def test_no_gpu_is_a_reason(machine: Callable[..., None]) -> None:
    machine()
    assert provider.why_unavailable() == "torch finds no CUDA device"


def test_the_gpu_is_not_asked_while_torch_is_imported(machine: Callable[..., None]) -> None:
    machine((9, 0))
    with pytest.raises(CudaNeededError):
        without_cuda(provider.why_unavailable)


def test_a_torch_without_cuda_is_a_reason_and_import_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = provider.why_unavailable()
    assert reason is not None
    assert "is built without CUDA; install a CUDA build of torch" in reason


def test_rocm_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for ROCm" in str(provider.why_unavailable())


def test_an_old_torch_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    assert "torch 2.10.1 is too old" in str(provider.why_unavailable())


def test_kernels_that_are_not_compiled_are_a_reason(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = library.load.__wrapped__
    machine((9, 0))
    monkeypatch.setattr(library, "load", real)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "lib.so")
    reason = provider.why_unavailable()
    assert reason is not None
    assert "not compiled" in reason
    assert "hatch run build-cuda" in reason
    assert "pip install --force-reinstall fa4-cuda" in reason


def test_a_library_that_is_none_is_a_reason(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = library.load.__wrapped__
    machine((9, 0))
    broken = tmp_path / "lib.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "load", real)
    monkeypatch.setattr(library, "LIBRARY", broken)
    assert "lib.so cannot be loaded" in str(provider.why_unavailable())


def test_a_function_that_torch_lacks_is_named(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine((9, 0))
    monkeypatch.setattr(library.load, "fa4_torch_find", staticmethod(lambda: b"torch_some_thing"))
    assert "lacks torch_some_thing" in str(provider.why_unavailable())


@pytest.mark.parametrize(
    ("capability", "taken"), [((9, 0), "fa4-cuda"), ((8, 6), "other"), ((10, 0), "other")]
)
def test_the_family_takes_it_on_hopper_and_another_elsewhere(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    taken: str,
) -> None:
    machine(capability)
    monkeypatch.setattr(provider, "import_kernels", lambda: None)
    monkeypatch.setattr(provider, "install_kernels", lambda: None)
    fa4_cuda.register()
    registry.unregister_flash_attention_impl("fa4-triton")
    # As fa4-triton, where that is recommended.
    registry.register_flash_attention_impl(
        "other", register_fn=lambda: None, family="FA4", priority=10
    )
    with pytest.warns(registry.RegistryWarning), registry.use_flash_attention_impl("FA4"):
        assert registry.current_flash_attention_impl() == taken


def test_importing_and_registering_loads_neither_torch_nor_the_kernels() -> None:
    program = (
        "import sys, fa4_cuda; fa4_cuda.register(); "
        "print({'torch', 'fa4_cuda.library'} & set(sys.modules), fa4_cuda.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["set()", "0.1.0"]
