"""Installations that have lost a part: `import torch` works, and says at most once what is gone.

In a strict environment that asks for something, it fails and says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OURS = ("flash_attention", "fa4_")
REPORT = """
import torch
import torch.nn.functional as F
x = torch.ones(1, 1, 4, 16, dtype=torch.bfloat16)
F.scaled_dot_product_attention(x, x, x)
print(torch.nn.attention.current_flash_attention_impl())
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is installed beside torch, but for our packages, whichever way those are."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.lower().startswith(OURS):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def unpacked(build: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    for package in ("core", "fa4-triton"):
        with zipfile.ZipFile(build(ROOT / "packages" / package)) as wheel:
            wheel.extractall(folder)
    return folder


@pytest.fixture
def installation(unpacked: Path, tmp_path: Path) -> Iterator[Path]:
    """The wheels of core and provider, unpacked; a test may remove what it likes."""
    folder = tmp_path / "installation"
    shutil.copytree(unpacked, folder)
    yield folder
    shutil.rmtree(folder)


def import_torch(
    installation: Path, elsewhere: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Import torch where nothing is installed but what is in both folders."""
    prelude = f"import sys; sys.path += [{str(installation)!r}, {str(elsewhere)!r}]\n"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLASH_ATTENTION_")}
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + REPORT],
        env={**inherited, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def remove(installation: Path, *patterns: str) -> None:
    for pattern in patterns:
        (found,) = installation.glob(pattern)
        shutil.rmtree(found)


REGISTRY = ("flash_attention_registry", "flash_attention_registry-*.dist-info")
REMOVED = {
    "the provider's package": ("fa4_triton",),
    "the registry": REGISTRY,
    "both": ("fa4_triton", *REGISTRY),
    "the registry's package": REGISTRY[:1],
}
MISSING = {
    "the provider's package": "No module named 'fa4_triton'",
    "the registry": "No module named 'flash_attention_registry'",
    "both": "No module named 'flash_attention_registry'",
    "the registry's package": "No module named 'flash_attention_registry'",
}


def test_the_whole_installation_works(installation: Path, elsewhere: Path) -> None:
    done = import_torch(installation, elsewhere, FLASH_ATTENTION_IMPL="fa4-triton")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fa4-triton\n", "")


@pytest.mark.parametrize("what", REMOVED)
def test_without_a_request_a_missing_part_is_not_noticed(
    what: str, installation: Path, elsewhere: Path
) -> None:
    remove(installation, *REMOVED[what])
    done = import_torch(installation, elsewhere)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


@pytest.mark.parametrize("what", REMOVED)
def test_with_a_request_torch_is_imported_with_one_warning(
    what: str, installation: Path, elsewhere: Path
) -> None:
    remove(installation, *REMOVED[what])
    done = import_torch(installation, elsewhere, FLASH_ATTENTION_IMPL="fa4-triton")
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert done.stderr.count("Warning: ") == 1, done.stderr
    assert MISSING[what] in done.stderr
    assert "Torch's own attention kernels run." in done.stderr


STRICT = {"FLASH_ATTENTION_IMPL": "fa4-triton", "FLASH_ATTENTION_IMPL_STRICT": "1"}


@pytest.mark.parametrize("what", REMOVED)
def test_in_a_strict_environment_torch_is_not_imported_and_the_reason_is_told(
    what: str, installation: Path, elsewhere: Path
) -> None:
    remove(installation, *REMOVED[what])
    done = import_torch(installation, elsewhere, **STRICT)
    assert (done.returncode, done.stdout) == (1, "")
    assert MISSING[what] in done.stderr
    assert "FLASH_ATTENTION_IMPL=fa4-triton" in done.stderr
    assert "_import_device_backends" in done.stderr


DAMAGED = {
    "a file of the registry that is cut off": ("flash_attention_registry/registry.py", b"def f("),
    "a file that is no text": ("flash_attention_registry/autoload.py", b"\xff\xfe\x00"),
    "a file of the registry that raises": ("flash_attention_registry/slot.py", b"1 / 0"),
}


@pytest.mark.parametrize(("file", "content"), DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_damaged_registry_is_as_good_as_none(
    file: str, content: bytes, strict: str, installation: Path, elsewhere: Path
) -> None:
    (installation / file).write_bytes(content)
    done = import_torch(
        installation, elsewhere, **{**STRICT, "FLASH_ATTENTION_IMPL_STRICT": strict}
    )
    assert "FLASH_ATTENTION_IMPL=fa4-triton is not honoured" in done.stderr
    assert "Error: " in done.stderr
    if strict == "1":
        assert (done.returncode, done.stdout) == (1, "")
    else:
        assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
        assert done.stderr.count("Warning: ") == 1


# What the hook makes of the variables where the registry, which reads them, cannot be imported


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The provider's hook, in a process without the registry, under these variables."""
    import fa4_triton_autoload

    def call(asked: str, strict: str = "1") -> None:
        monkeypatch.setitem(sys.modules, "flash_attention_registry.autoload", None)
        monkeypatch.setenv("FLASH_ATTENTION_IMPL", asked)
        monkeypatch.setenv("FLASH_ATTENTION_IMPL_STRICT", strict)
        fa4_triton_autoload.autoload()

    return call


@pytest.mark.parametrize("strict", ["1", "true", "Yes", " on "])
@pytest.mark.parametrize("asked", ["fa4-triton", "native,FA4", "FA4,"])
def test_the_hook_of_a_strict_environment_raises(
    asked: str, strict: str, hook: Callable[..., None]
) -> None:
    with pytest.raises(RuntimeError, match=f"FLASH_ATTENTION_IMPL={asked} is not honoured"):
        hook(asked, strict)


@pytest.mark.parametrize("strict", ["", "0", "false", "no", "off", "maybe"])
def test_the_hook_of_any_other_environment_prints_one_line(
    strict: str, hook: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    hook("fa4-triton", strict)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Warning: FLASH_ATTENTION_IMPL=fa4-triton is not honoured")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("asked", ["", " ", "native", "FA4, native"])
def test_torchs_own_kernels_can_be_had_without_the_registry(
    asked: str, hook: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    hook(asked)
    assert capsys.readouterr() == ("", "")
