"""What the registry is told on machines of every kind, most of them pretended."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
import torch
import triton

import fa4_triton
from fa4_triton import evidence, provider

HOPPER, AMPERE, TURING, ADA = (9, 0), (8, 0), (7, 5), (8, 9)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends to be a machine with GPUs of the given compute capabilities and a compiler."""
    monkeypatch.setattr(provider, "_interpreted", lambda: False)
    monkeypatch.setattr(provider, "_why_modes_differ", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(provider.shutil, "which", lambda name: f"/usr/bin/{name}")

    def plug_in(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    return plug_in


def reason_with(
    monkeypatch: pytest.MonkeyPatch, package: str, error: Exception | None
) -> str | None:
    """Why unavailable, if importing `package` raises `error`."""
    original = importlib.import_module

    def import_module(name: str, *args: str) -> object:
        if name == package and error is not None:
            raise error
        return original(name, *args)

    monkeypatch.setattr(provider.importlib, "import_module", import_module)
    return provider.why_unavailable()


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_a_missing_package_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    error = ModuleNotFoundError(f"No module named {package!r}", name=package)
    reason = reason_with(monkeypatch, package, error)
    assert reason is not None
    assert f"pip install '{package}>=" in reason


def test_numpy_is_asked_for_only_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'numpy'", name="numpy")
    reason = reason_with(monkeypatch, "triton", error)
    assert reason is not None
    assert "pip install 'fa4-triton[interpreter]'" in reason


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), OSError("libcudart.so.13")])
def test_a_broken_package_is_told_from_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    reason = reason_with(monkeypatch, "torch", error)
    assert reason is not None
    assert reason.startswith(f"torch is installed but broken ({error})")


@pytest.mark.parametrize(
    ("package", "version"), [(torch, "2.10.1+cu128"), (triton, "3.5.1"), (triton, "2.9")]
)
def test_an_old_version_is_named_with_the_one_to_take(
    monkeypatch: pytest.MonkeyPatch, package: object, version: str
) -> None:
    monkeypatch.setattr(package, "__version__", version)
    reason = provider.why_unavailable()
    assert reason is not None
    assert f"{version} is too old; upgrade it: pip install" in reason


@pytest.mark.parametrize(("torch_version", "triton_version"), [("2.11.0", "3.6.0"), ("3.0", "4.0")])
def test_the_oldest_and_newer_versions_are_taken(
    gpus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    torch_version: str,
    triton_version: str,
) -> None:
    gpus(AMPERE)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(triton, "__version__", triton_version)
    assert provider.why_unavailable() is None


@pytest.mark.parametrize("seen", [[AMPERE], [ADA], [HOPPER], [(12, 1)], [TURING, HOPPER]], ids=str)
def test_one_gpu_that_fits_suffices(
    gpus: Callable[..., None], seen: Iterable[tuple[int, int]]
) -> None:
    gpus(*seen)
    assert provider.why_unavailable() is None


def test_gpus_that_are_too_old_are_listed(gpus: Callable[..., None]) -> None:
    gpus(TURING, (7, 0), TURING)
    reason = provider.why_unavailable()
    assert reason is not None
    assert reason.endswith("compute capability 8.0 (Ampere) or newer; found 7.0, 7.5")


def test_without_a_gpu_the_interpreter_is_offered(gpus: Callable[..., None]) -> None:
    gpus()
    reason = provider.why_unavailable()
    assert reason is not None
    assert reason.startswith("torch finds no CUDA device")
    assert "set TRITON_INTERPRET=1 before Triton is first imported" in reason


def test_a_torch_without_cuda_is_told_from_a_machine_without_gpu(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus()
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = provider.why_unavailable()
    assert reason is not None
    assert "is built without CUDA" in reason


def test_rocm_is_declined(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    reason = provider.why_unavailable()
    assert reason is not None
    assert "built for ROCm" in reason


def test_a_missing_compiler_is_a_reason(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(HOPPER)
    monkeypatch.setattr(provider.shutil, "which", lambda name: None)
    reason = provider.why_unavailable()
    assert reason is not None
    assert "C compiler, and none is found; install gcc or clang" in reason
    monkeypatch.setenv("CC", "icx")
    reason = provider.why_unavailable()
    assert reason is not None
    assert "CC names 'icx', which is not found" in reason
    monkeypatch.setattr(triton.knobs.build, "impl", lambda *_: "launcher.so")
    assert provider.why_unavailable() is None


@pytest.mark.parametrize("compiler", ["gcc", "clang", "/opt/bin/cc"])
def test_any_compiler_that_triton_finds_will_do(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    gpus(HOPPER)
    if compiler.startswith("/"):
        monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(provider.shutil, "which", lambda name: name if name == compiler else None)
    assert provider.why_unavailable() is None


def test_the_interpreter_needs_neither_gpu_nor_compiler(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus()
    monkeypatch.setattr(provider.shutil, "which", lambda name: None)
    monkeypatch.setattr(provider, "_interpreted", lambda: True)
    assert provider.why_unavailable() is None


@pytest.mark.parametrize("interpreted", [False, True])
def test_kernels_that_there_are_not_are_a_reason(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch, interpreted: bool
) -> None:
    gpus(HOPPER)
    monkeypatch.setattr(provider, "_interpreted", lambda: interpreted)
    monkeypatch.setenv("FA4_TRITON_KERNELS", "fastest")
    reason = provider.why_unavailable()
    assert reason is not None
    assert reason.startswith("FA4_TRITON_KERNELS is 'fastest'")
    assert "unset it, or set it to 'hopper' or 'portable'" in reason
    monkeypatch.setenv("FA4_TRITON_KERNELS", "portable")
    assert provider.why_unavailable() is None


@pytest.mark.parametrize("first", ["", "1"])
def test_a_mode_that_changed_after_triton_was_imported_is_a_reason(first: str) -> None:
    """In a process of its own: a process cannot leave the interpreter."""
    second = "1" if first == "" else ""
    code = (
        "import os\n"
        f"os.environ['TRITON_INTERPRET'] = {first!r} or '0'\n"
        "import triton\n"
        f"os.environ['TRITON_INTERPRET'] = {second!r} or '0'\n"
        "from fa4_triton import provider\n"
        "print(provider.why_unavailable())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TRITON_INTERPRET was changed after Triton was first imported" in done.stdout


def test_on_hopper_the_family_is_told_that_cudnn_is_faster(gpus: Callable[..., None]) -> None:
    gpus(HOPPER)
    reason = provider.why_not_recommended()
    assert reason is not None
    assert "cuDNN's attention, which torch runs on compute capability 9.0, is faster" in reason
    assert 'activate_flash_attention_impl("fa4-triton")' in reason


def test_portable_kernels_that_are_asked_for_are_not_recommended_on_hopper(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "why_slower", lambda capability: None)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    gpus(HOPPER)
    assert provider.why_not_recommended() is None
    monkeypatch.setenv("FA4_TRITON_KERNELS", "portable")
    reason = provider.why_not_recommended()
    assert reason is not None
    assert reason.startswith("FA4_TRITON_KERNELS asks for the portable kernels. ")
    assert "cuDNN's attention is faster" in reason
    gpus(ADA)
    assert provider.why_not_recommended() is None


@pytest.mark.parametrize(("capability", "text"), [(AMPERE, "8.0"), ((10, 0), "10.0")])
def test_where_nothing_was_measured_nothing_is_recommended(
    gpus: Callable[..., None], capability: tuple[int, int], text: str
) -> None:
    gpus(capability)
    reason = provider.why_not_recommended()
    assert reason is not None
    assert f"not yet measured against stock on compute capability {text}" in reason


def test_one_head_dim_that_is_slower_in_one_direction_is_a_reason(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"forward": {64: 1.2, 128: 1.3}, "backward": {64: 0.99, 128: 1.1}}
    monkeypatch.setitem(evidence.MEASURED, ADA, evidence.Evidence("Flash", {}, speeds))
    gpus(ADA)
    reason = provider.why_not_recommended()
    assert reason is not None
    assert reason.startswith(
        "Flash, which torch runs on compute capability 8.9, is faster: in the backward these "
        "kernels have 0.99 (head dim 64) of its speed, the forward is no slower. "
    )


@pytest.mark.parametrize(
    ("seen", "recommended"),
    [([AMPERE], True), ([TURING, AMPERE], True), ([AMPERE, HOPPER], False)],
    ids=str,
)
def test_recommended_means_that_every_gpu_in_use_wins(
    gpus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    seen: Iterable[tuple[int, int]],
    recommended: bool,
) -> None:
    faster = {"forward": {64: 1.2, 128: 1.0}, "backward": {64: 1.1}}
    monkeypatch.setitem(evidence.MEASURED, AMPERE, evidence.Evidence("flash", {}, faster))
    gpus(*seen)
    assert (provider.why_not_recommended() is None) is recommended


def test_the_interpreter_is_never_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_interpreted", lambda: True)
    reason = provider.why_not_recommended()
    assert reason is not None
    assert "orders of magnitude slower" in reason


def test_oldest_gpu_is_what_the_kernels_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = []
    code = (
        "from fa4_triton.kernel_set import CAPABILITIES as declared\n"
        "print(declared.min_compute_capability, sorted(declared.device_types))"
    )
    for mode in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", mode)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        declared.append(done.stdout.strip())
    assert declared == [f"{provider.OLDEST_GPU} ['cuda']", "None ['cpu']"]


def test_preparing_imports_the_kernels_and_fails_where_they_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider.import_kernels()
    assert "fa4_triton.kernel_set" in sys.modules
    monkeypatch.setitem(sys.modules, "fa4_triton.kernel_set", None)
    with pytest.raises(ImportError):
        provider.import_kernels()


def test_importing_and_registering_load_neither_torch_nor_triton() -> None:
    code = (
        "import sys, fa4_triton\n"
        "fa4_triton.register()\n"
        "dir(fa4_triton)\n"
        "print({'torch', 'triton', 'numpy', 'importlib.metadata'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_registration_says_all_that_the_registry_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace()
    monkeypatch.setattr(
        "flash_attention_registry.register_flash_attention_impl",
        lambda name, **options: told.__dict__.update(name=name, **options),
    )
    fa4_triton.register()
    assert (told.name, told.family, told.priority) == ("fa4-triton", "FA4", 10)
    assert told.register_fn is provider.install_kernels
    assert told.availability is provider.why_unavailable
    assert told.recommended is provider.why_not_recommended
    assert told.prepare is provider.import_kernels


def test_public_names_are_there_and_others_are_not() -> None:
    assert set(fa4_triton.__all__) <= set(dir(fa4_triton))
    for name in ("flash_attn_func", "flash_attn_varlen_func", "register", "warmup"):
        assert callable(getattr(fa4_triton, name))
    with pytest.raises(AttributeError, match="has no attribute 'flash_attn_kvpacked_func'"):
        _ = fa4_triton.flash_attn_kvpacked_func
