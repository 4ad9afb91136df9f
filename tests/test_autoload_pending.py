"""A request that must wait for CUDA: pending after `import torch`, settled by the first call there.

The provider is made up: it waits as if for CUDA, and its kernels take CPU tensors. Calls go to the
CUDA key of the flash op itself, so neither a GPU nor a build of torch for one is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parent
STRICT = {"FLASH_ATTENTION_IMPL_STRICT": "1"}
TryPython = Callable[..., "subprocess.CompletedProcess[str]"]

# Where torch has a CUDA kernel, it must not be given CPU tensors.
without_cuda_kernels = pytest.mark.skipif(
    torch.version.cuda is not None, reason="needs a build of torch without CUDA kernels"
)

PROVIDER = """
import os
from flash_attention_registry import before_using_cuda, register_flash_attention_impl

asked = []

def why_unavailable():
    asked.append("asked")
    before_using_cuda()
    import torch
    torch.cuda.is_available()
    asked.append("used CUDA")
    return os.environ.get("WAITING_UNAVAILABLE")

def install(factor=3.0):
    from flash_attention_registry.sdpa import install
    from plain_kernels import PlainKernels
    return install(PlainKernels("waiting", factor))

def register():
    register_flash_attention_impl("waiting", register_fn=install, availability=why_unavailable)
"""

HOOK = """
def autoload():
    try:
        from flash_attention_registry.autoload import autoload as hook
    except ImportError:
        return
    hook()
"""

ENTRY_POINTS = """
[flash_attention_registry.providers.v1]
waiting = waiting_provider:register
[torch.backends]
waiting = waiting_provider_autoload:autoload
"""

# What the programs below have in common. A call on the provider's kernels gives threes.
STEPS = '''
import json, os, sys, warnings
import torch
from flash_attention_registry import current_flash_attention_impl, default_registry

OP = "_scaled_dot_product_flash_attention"
KEYSET = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

def call():
    """The first number that the flash op for CUDA computes; "stock" if it goes to torch's own."""
    x = torch.ones(1, 1, 16, 32, dtype=torch.bfloat16)
    kernel = torch.library.get_kernel(f"aten::{OP}", "CUDA")
    try:
        with torch.no_grad():
            out, *_ = kernel.call_boxed(KEYSET, x, x, x)
    except RuntimeError as error:
        if "no CUDA kernel to fall back to" not in str(error):
            raise
        return "stock"
    return out.flatten()[0].item()

def state():
    assert not torch.cuda.is_initialized()
    return [list(default_registry().request.pending), current_flash_attention_impl()]

def settle():
    """What there is before and after a call, and what the call gives."""
    return [state(), call(), state()]
'''

PENDING = [["waiting"], None]
SETTLED = [[], "waiting"]
FROM_PENDING_TO_SERVED = [PENDING, 3.0, SETTLED]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the provider is installed and asked for."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "waiting_provider.py").write_text(PROVIDER)
    (folder / "waiting_provider_autoload.py").write_text(HOOK)
    (folder / "steps.py").write_text(STEPS)
    info = folder / "waiting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: waiting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    path = [str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "FLASH_ATTENTION_IMPL": "waiting"}


@pytest.fixture
def run_steps(
    try_python: TryPython, environment: dict[str, str], tmp_path: Path
) -> Callable[..., tuple[list[Any], str]]:
    """Runs a program that prints JSON, a line each; gives that and what is on stderr."""

    def run(program: str, *options: str, **changes: str) -> tuple[list[Any], str]:
        file = tmp_path / "program.py"
        file.write_text(f"from steps import *\n{program}")
        done = try_python(*options, file, **(environment | changes))
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    return run


Steps = Callable[..., tuple[list[Any], str]]


def test_it_is_pending_until_the_first_call_which_is_served_already(run_steps: Steps) -> None:
    printed, said = run_steps("""
from waiting_provider import asked
print(json.dumps([state(), asked]))
print(json.dumps([call(), state(), asked]))
print(json.dumps(torch.nn.attention.current_flash_attention_impl()))
""")
    assert printed == [
        [PENDING, ["asked"]],
        [3.0, SETTLED, ["asked", "asked", "used CUDA"]],
        "waiting",
    ]
    assert said == ""


def test_torchs_registry_lists_it_while_it_is_pending(run_steps: Steps) -> None:
    printed, _ = run_steps("""
print(json.dumps(torch.nn.attention.list_flash_attention_impls()))
print(json.dumps(torch.nn.attention.current_flash_attention_impl()))
""")
    assert "waiting" in printed[0]
    assert printed[1] is None


def test_in_a_strict_environment_every_call_raises_until_it_can_be_met(run_steps: Steps) -> None:
    printed, said = run_steps(
        """
from flash_attention_registry import RequestUnavailableError
for _ in range(2):
    try:
        call()
    except RequestUnavailableError as error:
        print(json.dumps([str(error), state()]))
del os.environ["WAITING_UNAVAILABLE"]
print(json.dumps(settle()))
""",
        WAITING_UNAVAILABLE="no GPU of the right kind",
        **STRICT,
    )
    first, second, last = printed
    assert first == second
    assert "waiting: Flash attention impl 'waiting' is not available: no GPU of the" in first[0]
    assert first[1] == PENDING
    assert last == FROM_PENDING_TO_SERVED
    assert said == ""


@without_cuda_kernels
def test_otherwise_there_is_one_warning_and_torchs_own_kernels_run(run_steps: Steps) -> None:
    printed, said = run_steps(
        "print(json.dumps([call(), call(), state()]))",
        WAITING_UNAVAILABLE="no GPU of the right kind",
    )
    assert printed == [["stock", "stock", [[], None]]]
    assert said.count("RegistryWarning: ") == 1
    assert "no GPU of the right kind" in said
    assert "Torch's own attention kernels run." in said


@without_cuda_kernels
def test_a_warning_that_is_an_error_does_not_fail_the_call(run_steps: Steps) -> None:
    printed, said = run_steps(
        "print(json.dumps([call(), call(), state()]))",
        "-W",
        "error",
        WAITING_UNAVAILABLE="no GPU of the right kind",
    )
    assert printed == [["stock", "stock", [[], None]]]
    assert said.count("no GPU of the right kind") == 1


def test_a_preference_list_is_settled_as_a_whole(run_steps: Steps) -> None:
    printed, said = run_steps(
        "print(json.dumps(settle()))", FLASH_ATTENTION_IMPL="nobody,waiting,native"
    )
    pending = [["nobody", "waiting", "native"], None]
    assert (printed, said) == ([[pending, 3.0, SETTLED]], "")


DECISIONS = {
    "activated here": ("registry.activate_flash_attention_impl('mine')", "mine", 7.0),
    "used here": ("registry.use_flash_attention_impl('mine').__enter__()", "mine", 7.0),
    "activated in torch's registry": (
        "torch.nn.attention.activate_flash_attention_impl('mine')",
        "mine",
        7.0,
    ),
    "restored here": ("registry.restore_flash_attention_impl()", None, "stock"),
}


@without_cuda_kernels
def test_what_the_program_decides_first_supersedes_it(run_steps: Steps) -> None:
    """One process for all of them: the request is made pending again in between."""
    printed, _ = run_steps(f"""
import flash_attention_registry as registry
from flash_attention_registry import autoload
from waiting_provider import install
warnings.simplefilter("ignore")
registry.register_flash_attention_impl("mine", register_fn=lambda: install(7.0))
for decide in {[decide for decide, *_ in DECISIONS.values()]!r}:
    before = state()
    exec(decide)
    after = state()
    print(json.dumps([before, after, call()]))
    default_registry().restore_if_active()
    autoload._called = False
    autoload.autoload()
""")
    assert printed == [[PENDING, [[], active], out] for _, active, out in DECISIONS.values()]


# It reaches every process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_it_is_pending_in_a_forked_child(run_steps: Steps) -> None:
    printed, _ = run_steps("""
child = os.fork()
if child == 0:
    print(json.dumps(["child", settle()]), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(json.dumps(["parent", settle()]))
""")
    assert printed == [["child", FROM_PENDING_TO_SERVED], ["parent", FROM_PENDING_TO_SERVED]]


def test_it_is_pending_in_a_spawned_process(run_steps: Steps) -> None:
    printed, said = run_steps("""
import multiprocessing

def work(queue):
    queue.put(settle())

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(json.dumps(queue.get()))
    process.join()
""")
    assert (printed, said) == ([FROM_PENDING_TO_SERVED], "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs both ways to start workers")
def test_it_is_pending_in_the_workers_of_a_data_loader(run_steps: Steps) -> None:
    program = """
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return json.dumps([torch.utils.data.get_worker_info().id, settle()])

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        loader = DataLoader(Rows(), batch_size=1, num_workers=2, multiprocessing_context=method)
        print(json.dumps([json.loads(row) for (row,) in loader]))
    print(json.dumps(state()))
"""
    # Python's own process for semaphores now and then finds one that went while it looked.
    printed, said = run_steps(program, PYTHONWARNINGS="ignore:resource_tracker:UserWarning")
    workers = [[worker, FROM_PENDING_TO_SERVED] for worker in range(2)]
    assert (printed, said) == ([workers, workers, PENDING], "")


def test_it_is_pending_in_every_process_of_torchrun(
    try_python: TryPython, environment: dict[str, str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from steps import *\n"
        "os.write(1, (json.dumps([int(os.environ['RANK']), settle()]) + '\\n').encode())\n"
    )
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", program]
    done = try_python(*launch, **environment)
    assert done.returncode == 0, done.stderr
    printed = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert printed == [[rank, FROM_PENDING_TO_SERVED] for rank in range(2)]
