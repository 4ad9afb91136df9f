"""What a process of its own sees of a provider: what it imports, and what it activates unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

_SCRIPT = """
import importlib, json, sys

HEAVY = ("torch", "triton")
sys.path[:] = json.loads(sys.argv[2])
started_with = set(sys.modules)

def heavy():
    return [name for name in HEAVY if name in sys.modules and name not in started_with]

import flash_attention_registry as registry

module, _, attribute = sys.argv[1].partition(":")
callable_ = importlib.import_module(module)
found = {"imported_by_module": heavy()}
for name in attribute.split("."):
    callable_ = getattr(callable_, name)
active = {registry.current_flash_attention_impl()}
callable_()
found["imported_by_registering"] = heavy()
active.add(registry.current_flash_attention_impl())

import torch
from flash_attention_registry.sdpa import installed_kernel_sets

active.add(registry.current_flash_attention_impl())
active.update(kernel_set.name for kernel_set in installed_kernel_sets().values())
found["active"] = sorted(active - {None})
print("FOUND", json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a fresh process found.

    Attributes:
        imported_by_module: Heavy packages that importing the entry point's module has imported.
        imported_by_registering: The same once its callable was called.
        active: What was active or installed at any time, ``import torch`` included.
    """

    imported_by_module: tuple[str, ...]
    imported_by_registering: tuple[str, ...]
    active: tuple[str, ...]


def in_a_fresh_process(value: str) -> Findings:
    """Import, register and import torch in a process whose environment asks for nothing.

    Args:
        value: An entry point's ``module:attribute``.
    """
    return _findings(value, tuple(sys.path))


@lru_cache(maxsize=8)  # several tests ask, and importing torch takes seconds
def _findings(value: str, path: tuple[str, ...]) -> Findings:
    inherited = {
        name: text for name, text in os.environ.items() if not name.startswith("FLASH_ATTENTION_")
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, value, json.dumps(path)],
        cwd=Path(__file__).parent,
        env=inherited,
        capture_output=True,
        text=True,
        check=False,
    )
    line = done.stdout.rpartition("FOUND ")[2]
    if done.returncode != 0:
        pytest.fail(
            f"{value} cannot be imported, called and followed by `import torch` in a process of "
            f"its own (exit status {done.returncode}):\n{done.stderr}"
        )
    return Findings(**{name: tuple(found) for name, found in json.loads(line).items()})
