"""Importing the package costs next to nothing, whoever imports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flash_attention_registry

SOURCE = str(Path(flash_attention_registry.__file__).parents[1])
EXPENSIVE = [
    "torch",
    "numpy",
    "threading",
    "importlib.metadata",
    "dataclasses",
    "inspect",
    "logging",
    "typing",
]


def run(code: str, *options: str) -> str:
    """Run `code` in an interpreter without site packages and return what it printed."""
    prelude = f"import sys; sys.path.insert(0, {SOURCE!r})\n"
    command = [sys.executable, "-I", "-S", *options, "-c", prelude + code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_import_loads_nothing_expensive():
    loaded = run(
        "before = set(sys.modules)\n"
        "import flash_attention_registry\n"
        "print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "flash_attention_registry.registry" in loaded
    assert sorted(set(loaded) & set(EXPENSIVE)) == []
    assert "flash_attention_registry.sdpa" not in loaded


def test_the_import_loads_the_standard_library_only():
    loaded = run(
        "before = set(sys.modules)\n"
        "import flash_attention_registry\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(tops - sys.stdlib_module_names))"
    ).split()
    assert loaded == ["flash_attention_registry"]


def test_registering_and_activating_by_name_reads_no_metadata():
    loaded = run(
        "import flash_attention_registry as registry\n"
        "registry.register_flash_attention_impl('x', register_fn=lambda: None)\n"
        "registry.activate_flash_attention_impl('x')\n"
        "assert registry.current_flash_attention_impl() == 'x'\n"
        "print(*sys.modules)"
    ).split()
    assert "importlib.metadata" not in loaded


def test_the_import_takes_milliseconds(tmp_path):
    # With bytecode, as an installed package has it, and after what every interpreter imports at its
    # start. Time of the processor, the best of ten: others may be at work on this machine.
    code = (
        "import os, time; start = time.process_time()\n"
        "import flash_attention_registry\n"
        "print(1e3 * (time.process_time() - start))"
    )
    cache = ("-X", f"pycache_prefix={tmp_path}")
    write = "import sys; sys.dont_write_bytecode = False\n"
    run(write + "import flash_attention_registry", *cache)
    assert list(tmp_path.rglob("*.pyc"))
    assert min(float(run(code, *cache)) for _ in range(10)) < 10


def test_reading_a_lazy_name_loads_its_module():
    loaded = run(
        "from flash_attention_registry import FlashAttentionHandle, ImplReport\n"
        "print(FlashAttentionHandle.__name__, ImplReport.__name__)"
    ).split()
    assert loaded == ["FlashAttentionHandle", "ImplReport"]
