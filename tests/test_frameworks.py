"""The page for framework authors: its function, and the tests that it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "frameworks.md"
NOT_ON_THE_PAGE = """
import flash_attention_registry as registry
from my_framework import choose_attention


def test_native_wins_over_what_waits_for_the_gpu(flash_attention_registry_reset, monkeypatch):
    reset = flash_attention_registry_reset
    reset.register("on-gpu", register_fn=len, availability=registry.before_using_cuda)
    monkeypatch.setenv("FLASH_ATTENTION_IMPL", "on-gpu")
    reset.request.honour(lambda device_type, first: None)
    assert reset.request.pending == ("on-gpu",)
    assert choose_attention("native") is None
    assert reset.request.pending == ()
"""


def test_what_the_page_shows_works(run_python: Callable[..., str], tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    _without_us, function, of_the_choice, of_attention = blocks
    (tmp_path / "my_framework.py").write_text(function)
    tests = {"choice": of_the_choice, "attention": of_attention, "native": NOT_ON_THE_PAGE}
    for name, text in tests.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    printed = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path),
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert f"{sum(text.count('def test_') for text in tests.values())} passed" in printed
