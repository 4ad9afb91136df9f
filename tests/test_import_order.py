"""Whatever imports torch first: what the environment asks for is not lost, and nothing is said.

The hook in `import torch` runs inside of the import, or the loading, of a provider then, which
cannot be used before that is over.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ASKED = {
    "FLASH_ATTENTION_IMPL": "fa4-triton",
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
SERVED = """
import json, torch
from flash_attention_registry import current_flash_attention_impl as current
from flash_attention_registry.sdpa import dispatch_counts
x = torch.ones(1, 1, 16, 16, dtype=torch.bfloat16)
out = torch.nn.functional.scaled_dot_product_attention(x, x, x)
assert torch.equal(out, x)
print(json.dumps([current(), sum(one.served for one in dispatch_counts().values())]))
"""
EAGER = """
import torch
from flash_attention_registry import register_flash_attention_impl
def register():
    register_flash_attention_impl("eager", register_fn=lambda: None, availability=why)
def why():
    return UNAVAILABLE
"""
TryPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def program(try_python: TryPython) -> Callable[..., Any]:
    """Runs a program that asks for fa4-triton; gives what it prints, and says nothing else."""

    def run(code: str, **environment: str) -> Any:
        done = try_python("-c", code, **{**ASKED, **environment})
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)

    return run


FIRST_IMPORTS = [
    "import fa4_triton.kernel_set",
    "import fa4_triton.functional",
    "from fa4_triton import flash_attn_func",
    "import fa4_triton",
    "import flash_attention_registry.sdpa",
    "import flash_attention_registry.sdpa.router",
    "import triton",
]


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_the_first_call_is_served(first: str, program: Callable[..., Any]) -> None:
    assert program(first + SERVED) == ["fa4-triton", 1]


def test_it_is_pending_after_the_providers_own_import_and_settled_by_the_next_transition(
    program: Callable[..., Any],
) -> None:
    printed = program("""
import fa4_triton.kernel_set
import json, flash_attention_registry as registry
def state():
    pending = registry.default_registry().request.pending
    return [pending, registry.current_flash_attention_impl()]
before = state()
registry.explain_flash_attention_impls()
print(json.dumps([before, state()]))
""")
    assert printed == [[["fa4-triton"], None], [[], "fa4-triton"]]


@pytest.fixture
def eager(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Installs a provider whose module imports torch at its top, and may not be available."""

    def install(unavailable: str) -> dict[str, str]:
        source = EAGER.replace("UNAVAILABLE", unavailable)
        (tmp_path / "eager_provider.py").write_text(source)
        info = tmp_path / "eager-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eager\nVersion: 1.0\n")
        points = "[flash_attention_registry.providers.v1]\neager = eager_provider:register\n"
        (info / "entry_points.txt").write_text(points)
        path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, path))}

    return install


LOADED = """
import json, sys, flash_attention_registry as registry
try:
    registry.{call}
except registry.ImplUnavailableError as error:
    assert "no luck" in str(error)
assert "torch" in sys.modules
print(json.dumps(registry.current_flash_attention_impl()))
"""


@pytest.mark.parametrize(
    ("call", "unavailable", "active"),
    [
        ("activate_flash_attention_impl('eager')", "None", "eager"),
        ("activate_flash_attention_impl('eager')", "'no luck'", "fa4-triton"),
        ("explain_flash_attention_impls()", "None", "fa4-triton"),
    ],
    ids=["the program has decided", "the program failed", "the program only asks"],
)
def test_a_provider_that_imports_torch_does_not_lose_it(
    call: str,
    unavailable: str,
    active: str,
    program: Callable[..., Any],
    eager: Callable[[str], dict[str, str]],
) -> None:
    assert program(LOADED.format(call=call), **eager(unavailable)) == active


def test_nor_if_it_is_what_is_asked_for(
    program: Callable[..., Any], eager: Callable[[str], dict[str, str]]
) -> None:
    code = LOADED.format(call="explain_flash_attention_impls()")
    assert program(code, **eager("None"), FLASH_ATTENTION_IMPL="eager") == "eager"
