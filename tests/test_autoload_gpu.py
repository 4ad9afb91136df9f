"""A request on a real GPU: `import torch` leaves CUDA alone, and the first call there is served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_attention_registry as registry

pytestmark = pytest.mark.gpu

RUN_AND_COUNT = Path(__file__).resolve().parent / "run_and_count.py"
ASKED = {"FLASH_ATTENTION_IMPL": "fa4-triton"}
FAMILY = {"FLASH_ATTENTION_IMPL": "FA4"}

RunPython = Callable[..., str]

# What the programs below have in common, after `import torch` and nothing else.
STEPS = '''
import torch
after_import = torch.cuda.is_initialized()
import ctypes, json, os, sys, warnings
import torch.nn.functional as F
from flash_attention_registry import current_flash_attention_impl, default_registry

def cuda_is_touched():
    """Whether torch, or anybody in this process, has initialised CUDA."""
    NOT_INITIALIZED = 3
    count = ctypes.c_int()
    answer = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count))
    return after_import or torch.cuda.is_initialized() or answer != NOT_INITIALIZED

def call():
    x = torch.randn(1, 4, 128, 64, generator=torch.Generator().manual_seed(0))
    x = x.to("cuda", torch.bfloat16)
    return F.scaled_dot_product_attention(x, x, x)

def served():
    from flash_attention_registry.sdpa import dispatch_counts
    counts = dispatch_counts()
    return [current_flash_attention_impl(), counts.served, counts.declined]

def pending():
    return list(default_registry().request.pending)

assert not cuda_is_touched()
'''

SERVED_ONCE = ["fa4-triton", 1, 0]


@pytest.fixture
def run_steps(run_python: RunPython, tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a program that prints JSON, a line each."""

    def run(program: str, **environment: str) -> list[Any]:
        file = tmp_path / "program.py"
        file.write_text(STEPS + program)
        return [json.loads(line) for line in run_python(file, **environment).splitlines()]

    return run


Steps = Callable[..., list[Any]]


def test_an_unmodified_program_is_served(run_python: RunPython, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "x = torch.randn(1, 4, 128, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()\n"
    )
    counts = json.loads(run_python(RUN_AND_COUNT, program, **ASKED).splitlines()[-1])
    assert counts["active"] == "fa4-triton"
    assert (sum(counts["served"].values()), counts["declined"]) == (2, {})


@pytest.mark.parametrize("name", ["fa4-triton", "FA4", "nobody,fa4-triton"])
def test_the_import_leaves_cuda_alone_and_the_request_pending(run_steps: Steps, name: str) -> None:
    (names,) = run_steps("print(json.dumps(pending()))", FLASH_ATTENTION_IMPL=name)
    assert names == name.split(",")


def test_the_first_call_is_served(run_steps: Steps) -> None:
    printed = run_steps("call(); print(json.dumps([served(), pending()]))", **ASKED)
    assert printed == [[SERVED_ONCE, []]]


def test_a_program_may_ask_for_it_before_the_first_call(run_steps: Steps) -> None:
    printed = run_steps(
        "from flash_attention_registry import activate_requested_flash_attention_impl as ask\n"
        "print(json.dumps([ask(), pending()]))\n"
        "call(); print(json.dumps(served()))",
        **ASKED,
    )
    assert printed == [["fa4-triton", []], SERVED_ONCE]


def test_a_child_forked_after_the_import_can_use_cuda_and_is_served(run_steps: Steps) -> None:
    printed = run_steps(
        """
child = os.fork()
if child == 0:
    call()
    print(json.dumps(["child", served()]), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert not cuda_is_touched()
call()
print(json.dumps(["parent", served()]))
""",
        **ASKED,
    )
    assert printed == [["child", SERVED_ONCE], ["parent", SERVED_ONCE]]


def test_workers_of_a_data_loader_can_use_cuda_and_are_served(run_steps: Steps) -> None:
    printed = run_steps(
        """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        call()
        return json.dumps(served())

loader = torch.utils.data.DataLoader(
    Rows(), batch_size=1, num_workers=2, multiprocessing_context="fork"
)
print(json.dumps([json.loads(row) for (row,) in loader]))
""",
        **ASKED,
    )
    assert printed == [[SERVED_ONCE, SERVED_ONCE]]


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("0", 1)])
def test_devices_chosen_after_the_import_are_those_that_are_seen(
    run_steps: Steps, visible: str, count: int
) -> None:
    printed = run_steps(
        f"""
os.environ["CUDA_VISIBLE_DEVICES"] = {visible!r}
print(json.dumps([torch.cuda.is_available(), torch.cuda.device_count()]))
if torch.cuda.is_available():
    call()
    print(json.dumps(served()))
""",
        **ASKED,
    )
    assert printed == [[count > 0, count], *[SERVED_ONCE] * count]


@pytest.fixture
def _not_recommended() -> None:
    members = [one for one in registry.explain_flash_attention_impls() if one.family == "FA4"]
    if any(one.recommended for one in members):
        pytest.skip("a member of the family is recommended on this GPU")


@pytest.mark.usefixtures("_not_recommended")
def test_a_family_of_which_none_is_recommended_is_one_warning_and_results_are_torchs(
    run_steps: Steps, tmp_path: Path
) -> None:
    program = """
with warnings.catch_warnings(record=True) as given:
    warnings.simplefilter("always")
    outs = [call(), call()]
torch.save(outs, sys.argv[0] + ".outs")
print(json.dumps([[str(warning.message) for warning in given], served(), pending()]))
"""
    outs = tmp_path / "program.py.outs"
    ((said, *_),) = run_steps(program, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert said == []
    stock = torch.load(outs)
    ((said, *state),) = run_steps(program, **FAMILY)
    (text,) = said
    assert "fa4-triton: not recommended here: " in text
    assert text.endswith("\nTorch's own attention kernels run.")
    assert state == [[None, 0, 0], []]
    for mine, theirs in zip(torch.load(outs), stock, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("_not_recommended")
def test_in_a_strict_environment_every_call_raises(run_steps: Steps) -> None:
    printed = run_steps(
        """
from flash_attention_registry import RequestUnavailableError
for _ in range(2):
    try:
        call()
    except RequestUnavailableError as error:
        print(json.dumps(str(error)))
""",
        **FAMILY,
        FLASH_ATTENTION_IMPL_STRICT="1",
    )
    assert len(printed) == 2
    for text in printed:
        assert "fa4-triton: not recommended here: " in text
