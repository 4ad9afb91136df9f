"""`flash-attention doctor` with torch: what it foretells is what happens, and nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

CHOICES = ("CUDA_VISIBLE_DEVICES", "TORCH_DEVICE_BACKEND_AUTOLOAD", "TRITON_INTERPRET")
CHOICE_PREFIXES = ("FLASH_ATTENTION_", "TORCHINDUCTOR_")
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
INTERPRETED = {**ON_CPU, "TRITON_INTERPRET": "1"}
STOCK = {**ON_CPU, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
FORWARD_OP = "_scaled_dot_product_flash_attention_for_cpu"

# A kernel set whose results are wrong and whose calls are counted. What it serves is up to a test.
ZEROS = """
import json, sys, warnings
import torch
import torch.nn.functional as F
import flash_attention_registry as registry
from flash_attention_registry import doctor
from flash_attention_registry.sdpa import Capabilities, dispatch_counts, install

class Zeros:
    name = "zeros-kernels"
    capabilities = Capabilities(
        device_types=frozenset({"cpu"}), dtypes=frozenset({torch.bfloat16}), head_dims=(64,),
        features=frozenset({"backward", "causal"}), deterministic="always",
    )
    ran = 0
    def supports(self, call):
        return self.capabilities.reason_to_decline(call)
    def forward(self, call):
        Zeros.ran += 1
        batch, rows, heads, _ = call.query.shape
        return torch.zeros_like(call.query), torch.zeros(batch, heads, rows)
    def backward(self, call, grad_out, out, lse):
        Zeros.ran += 1
        return tuple(map(torch.zeros_like, (call.query, call.key, call.value)))

registry.register_flash_attention_impl("zeros", register_fn=lambda: install(Zeros(), "cpu"))

def kernels_of(diagnosis):
    return [call.kernel for call in diagnosis.calls]

def show(**found):
    print(json.dumps(found))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, in an environment that chooses no kernels but by `environment`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in CHOICES and not name.startswith(CHOICE_PREFIXES)
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def doctor(*arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Run `flash-attention doctor --json`; return its exit status and its document."""
    command = ("-m", "flash_attention_registry", "doctor", "--json", *arguments)
    done = run(*command, **environment)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def found_by(code: str, **environment: str) -> dict[str, Any]:
    """Run `code` after `ZEROS`; return what it shows."""
    done = run("-c", ZEROS + code, **{**STOCK, **environment})
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def kernels(document: dict[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """By call: what would run it, and what is said about that."""
    return {call["call"]: (call["kernel"], call["reason"]) for call in document["calls"]}


# The command


def test_it_shows_that_the_kernels_run_that_the_environment_asks_for() -> None:
    status, document = doctor("--run", **INTERPRETED, FLASH_ATTENTION_IMPL="fa4-triton")
    assert (status, document["problems"]) == (0, [])
    assert document["active"] == "fa4-triton"
    assert document["request"] == {"names": ["fa4-triton"], "state": "active", "reasons": {}}
    assert document["run"] == {
        "asked": None,
        "active": "fa4-triton",
        "device": "cpu",
        "served": True,
        "counts": {
            FORWARD_OP: {"served": 1, "declined": {}},
            f"{FORWARD_OP}_backward": {"served": 1, "declined": {}},
        },
        "reason": None,
    }
    assert kernels(document) == {
        "bfloat16, causal": ("fa4-triton", None),
        "bfloat16 with a mask": ("stock", "attn_bias is not supported"),
        "float32, causal": ("stock", "dtype torch.float32 is not supported"),
        "bfloat16 with dropout, in training": (
            "stock",
            "what torch sends to this backend never reaches an implementation",
        ),
    }


def test_what_cannot_run_here_is_a_problem_with_its_reason() -> None:
    status, document = doctor(**ON_CPU, FLASH_ATTENTION_IMPL="fa4-triton")
    assert status == 1
    assert document["request"]["state"] == "failed"
    assert "set TRITON_INTERPRET=1" in document["request"]["reasons"]["fa4-triton"]
    assert {kernel for kernel, _ in kernels(document).values()} == {"stock"}


def test_a_call_is_made_under_the_name_that_is_given() -> None:
    status, document = doctor("--run", "fa4-triton", **INTERPRETED)
    assert status == 0
    assert (document["run"]["active"], document["run"]["served"]) == ("fa4-triton", True)
    assert document["active"] is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nope", "UnknownImplError"), ("torch:FA4", "ImplUnavailableError")],
)
def test_a_name_that_cannot_be_activated_is_a_problem(name: str, reason: str) -> None:
    status, document = doctor("--run", name, **ON_CPU)
    assert status == 1
    assert (document["run"]["served"], document["run"]["device"]) == (False, None)
    assert document["run"]["reason"].startswith(reason)


def test_with_nothing_asked_for_stock_runs_and_all_is_well() -> None:
    status, document = doctor("--run", **ON_CPU)
    assert status == 0
    assert (document["run"]["served"], document["run"]["counts"]) == (None, {})
    assert document["run"]["device"] == "cpu"
    assert "torch:FA4" in [one["name"] for one in document["implementations"]]


def test_a_strict_environment_that_ends_the_import_of_torch_is_explained() -> None:
    strict = {**INTERPRETED, "FLASH_ATTENTION_IMPL_STRICT": "1"}
    status, document = doctor("--run", **strict, FLASH_ATTENTION_IMPL="FA4")
    assert status == 1
    assert "RequestUnavailableError ended the import of torch" in document["torch_problem"]
    assert "not recommended here" in document["request"]["reasons"]["FA4"]
    assert document["run"]["served"] is False


def test_a_hook_that_is_switched_off_is_why_nothing_is_active() -> None:
    off = {**INTERPRETED, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    status, document = doctor("--run", **off, FLASH_ATTENTION_IMPL="fa4-triton")
    assert status == 1
    (reason,) = document["request"]["reasons"].values()
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from activating it" in reason
    assert [trap["found"][:20] for trap in document["traps"]] == ["FLASH_ATTENTION_IMPL"]


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_serve_what_the_environment_asks_for() -> None:
    status, document = doctor("--run", FLASH_ATTENTION_IMPL="fa4-triton")
    assert (status, document["problems"]) == (0, [])
    assert document["torch"]["gpus"]
    assert (document["run"]["device"], document["run"]["served"]) == ("cuda", True)
    assert kernels(document)["bfloat16, causal"] == ("fa4-triton", None)


@pytest.mark.gpu
def test_interpreted_kernels_beside_a_gpu_are_a_trap() -> None:
    status, document = doctor("--run", TRITON_INTERPRET="1", FLASH_ATTENTION_IMPL="fa4-triton")
    assert status == 1
    assert "which is installed for cpu" in document["run"]["reason"]
    assert any("TRITON_INTERPRET=1 is set" in trap["found"] for trap in document["traps"])


# What it foretells


AS_FORETOLD = """
from flash_attention_registry.sdpa import probe
device_type = "cuda" if torch.cuda.is_available() else "cpu"
found = {}
with registry.use_flash_attention_impl(NAME):
    foretold = {call.call: call for call in probe.typical_calls()}
    for kind in probe._KINDS:
        query, mask = probe.query_of(kind, device_type), probe._mask(kind, device_type)
        before = dispatch_counts()
        F.scaled_dot_product_attention(
            query, query, query, mask, dropout_p=kind.dropout_p, is_causal=kind.causal)
        served = dispatch_counts().served - before.served
        reasons = [why for op, count in dispatch_counts().items() for why in count.declined
                   if why not in (before[op].declined if op in before else ())]
        call = foretold[kind.name]
        found[kind.name] = [call.kernel, call.reason if reasons else None, served, reasons,
                            call.backend]
show(**found)
"""


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        pytest.param("zeros", STOCK, id="a stand-in"),
        pytest.param("fa4-triton", INTERPRETED, id="interpreted"),
        pytest.param("fa4-triton", {}, id="gpu", marks=pytest.mark.gpu),
    ],
)
def test_what_it_foretells_is_what_happens(name: str, environment: dict[str, str]) -> None:
    done = run("-c", ZEROS + AS_FORETOLD.replace("NAME", repr(name)), **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 4
    for kernel, reason, served, reasons, _backend in found.values():
        assert kernel == (name if served else "stock")
        assert reasons == ([] if reason is None else [reason])
    assert sum(served for _, _, served, _, _ in found.values()) == 1


def test_this_torch_still_tells_which_backend_it_chooses() -> None:
    # torch._fused_sdp_choice is private: where it is gone, doctor can only say "unknown".
    found = found_by("show(backends=[call.backend for call in doctor.diagnose().calls])")
    assert found["backends"] == ["FLASH_ATTENTION", "FLASH_ATTENTION", "FLASH_ATTENTION", "MATH"]


def test_a_torch_that_does_not_tell_its_choice_does_no_harm() -> None:
    found = found_by(
        "del torch._fused_sdp_choice\n"
        "registry.activate_flash_attention_impl('zeros')\n"
        "diagnosis = doctor.diagnose(run=True)\n"
        "show(calls=[(call.backend, call.kernel) for call in diagnosis.calls],\n"
        "     served=diagnosis.run.served)"
    )
    assert found == {"calls": [[None, None]] * 4, "served": True}


def test_a_backward_that_is_not_served_is_foretold_and_noticed() -> None:
    found = found_by(
        "from dataclasses import replace\n"
        "Zeros.capabilities = replace(Zeros.capabilities, features=frozenset({'causal'}))\n"
        "registry.activate_flash_attention_impl('zeros')\n"
        "diagnosis = doctor.diagnose(run=True)\n"
        "show(reason=diagnosis.calls[0].reason, run=diagnosis.run.reason, ok=diagnosis.ok)"
    )
    assert found == {
        "reason": "but its backward runs on stock: backward is not supported",
        "run": f"{FORWARD_OP}_backward: backward is not supported",
        "ok": False,
    }


def test_checks_that_raise_are_told() -> None:
    found = found_by(
        "Zeros.supports = lambda self, call: 1 / 0\n"
        "registry.activate_flash_attention_impl('zeros')\n"
        "show(reason=doctor.diagnose().calls[0].reason)"
    )
    assert found == {"reason": "ZeroDivisionError: division by zero"}


def test_an_op_that_this_torch_has_changed_stays_on_stock() -> None:
    found = found_by(
        "from flash_attention_registry.sdpa import router\n"
        "registry.activate_flash_attention_impl('zeros')\n"
        "del router._slots['cpu'].routes['" + FORWARD_OP + "']\n"
        "call = doctor.diagnose().calls[0]\n"
        "show(kernel=call.kernel, reason=call.reason)"
    )
    assert found["kernel"] == "stock"
    assert "has arguments that are not known here" in found["reason"]


def test_kernels_that_are_installed_by_other_means_are_not_judged() -> None:
    found = found_by(
        "class Handle:\n"
        "    remove = staticmethod(lambda: None)\n"
        "registry.register_flash_attention_impl('own means', register_fn=Handle)\n"
        "registry.activate_flash_attention_impl('own means')\n"
        "diagnosis = doctor.diagnose(run=True)\n"
        "show(kernels=kernels_of(diagnosis), served=diagnosis.run.served, ok=diagnosis.ok,\n"
        "     reason=diagnosis.run.reason)"
    )
    assert found == {
        "kernels": [None] * 4,
        "served": None,
        "ok": True,
        "reason": "own means does not use flash_attention_registry.sdpa, which therefore cannot "
        "tell",
    }


def test_kernels_that_are_installed_past_the_registry_are_named() -> None:
    found = found_by(
        "install(Zeros(), 'cpu')\n"
        "diagnosis = doctor.diagnose(run=True)\n"
        "show(kernels=kernels_of(diagnosis), run=diagnosis.run.active,\n"
        "     served=diagnosis.run.served)"
    )
    assert found["kernels"] == ["zeros-kernels", "stock", "stock", "stock"]
    assert (found["run"], found["served"]) == ("zeros-kernels", True)


def test_kernels_for_another_device_are_not_used() -> None:
    found = found_by(
        "from dataclasses import replace\n"
        "Zeros.capabilities = replace(Zeros.capabilities, device_types=frozenset({'cuda'}))\n"
        "registry.register_flash_attention_impl('far', register_fn=lambda: install(Zeros()))\n"
        "registry.activate_flash_attention_impl('far')\n"
        "diagnosis = doctor.diagnose(run=True)\n"
        "show(reason=diagnosis.calls[0].reason, run=diagnosis.run.reason)"
    )
    assert found["reason"] == "far is installed for cuda"
    assert found["run"] == (
        "neither forward nor backward reached far, which is installed for cuda; torch chose "
        "FLASH_ATTENTION"
    )


# The process that is diagnosed


def test_a_diagnosis_in_a_running_program_changes_nothing() -> None:
    found = found_by(
        "registry.activate_flash_attention_impl('zeros')\n"
        "query = torch.ones(1, 1, 8, 64, dtype=torch.bfloat16)\n"
        "F.scaled_dot_product_attention(query, query, query)\n"
        "state, counts, ran = torch.get_rng_state(), str(dispatch_counts()), Zeros.ran\n"
        "with torch.inference_mode(), torch.autocast('cpu', dtype=torch.bfloat16):\n"
        "    diagnosis = doctor.diagnose()\n"
        "    modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu')\n"
        "show(kernels=kernels_of(diagnosis), counts=diagnosis.counts, ran=Zeros.ran - ran,\n"
        "     same_counts=str(dispatch_counts()) == counts, modes=modes,\n"
        "     same_state=torch.equal(state, torch.get_rng_state()),\n"
        "     active=registry.current_flash_attention_impl())"
    )
    assert found == {
        "kernels": ["zeros", "stock", "stock", "stock"],
        "counts": {FORWARD_OP: {"served": 1, "declined": {}}},
        "ran": 0,
        "same_counts": True,
        "modes": [True, True],
        "same_state": True,
        "active": "zeros",
    }


def test_the_call_that_is_made_is_told_from_those_before_it() -> None:
    found = found_by(
        "registry.activate_flash_attention_impl('zeros')\n"
        "query = torch.ones(1, 1, 8, 64, dtype=torch.bfloat16)\n"
        "for _ in range(3):\n"
        "    F.scaled_dot_product_attention(query, query, query)\n"
        "    F.scaled_dot_product_attention(query.float(), query.float(), query.float())\n"
        "with torch.no_grad():\n"
        "    diagnosis = doctor.diagnose(run=True)\n"
        "show(served=diagnosis.run.served, before=diagnosis.counts, during=diagnosis.run.counts)"
    )
    declined = {"dtype torch.float32 is not supported": 3}
    assert found == {
        "served": True,
        "before": {FORWARD_OP: {"served": 3, "declined": declined}},
        "during": {
            FORWARD_OP: {"served": 1, "declined": {}},
            f"{FORWARD_OP}_backward": {"served": 1, "declined": {}},
        },
    }


ONE_CALL = {
    FORWARD_OP: {"served": 1, "declined": {}},
    f"{FORWARD_OP}_backward": {"served": 1, "declined": {}},
}


def test_calls_of_other_threads_are_not_taken_for_the_one_that_is_made() -> None:
    found = found_by(
        "import threading\n"
        "registry.activate_flash_attention_impl('zeros')\n"
        "begun, over = threading.Event(), threading.Event()\n"
        "def train(dtype):\n"
        "    query = torch.ones(1, 1, 8, 64, dtype=dtype, requires_grad=True)\n"
        "    while not over.is_set():\n"
        "        F.scaled_dot_product_attention(query, query, query).sum().backward()\n"
        "        begun.set()\n"
        "threads = [threading.Thread(target=train, args=(dtype,))\n"
        "           for dtype in (torch.bfloat16, torch.float32)]\n"
        "sys.setswitchinterval(1e-5)\n"
        "for thread in threads: thread.start()\n"
        "begun.wait()\n"
        "served = dispatch_counts().served\n"
        "runs = [doctor.diagnose(run=True).run for _ in range(10)]\n"
        "over.set()\n"
        "for thread in threads: thread.join()\n"
        "show(counts=[run.counts for run in runs], served=[run.served for run in runs],\n"
        "     of_others=dispatch_counts().served - served)"
    )
    assert found["counts"] == [ONE_CALL] * 10
    assert found["served"] == [True] * 10
    assert found["of_others"] > 20


def test_attention_inside_of_a_kernel_set_is_not_taken_for_it_either() -> None:
    found = found_by(
        "def forward(self, call):\n"
        "    other = torch.ones(1, 1, 8, 64, dtype=torch.bfloat16)\n"
        "    F.scaled_dot_product_attention(other, other, other)\n"
        "    query = call.query.transpose(1, 2)\n"
        "    F.scaled_dot_product_attention(query, query, query)\n"
        "    return ran(self, call)\n"
        "ran, Zeros.forward = Zeros.forward, forward\n"
        "run = doctor.diagnose(run='zeros').run\n"
        "show(counts=run.counts, served=run.served, nested=dispatch_counts().declined)"
    )
    assert found == {"counts": ONE_CALL, "served": True, "nested": 2}


def test_nobody_watches_any_call_afterwards() -> None:
    found = found_by(
        "from flash_attention_registry.sdpa.watch import watches\n"
        "doctor.diagnose(run='zeros')\n"
        "Zeros.forward = lambda self, call: 1 / 0\n"
        "doctor.diagnose(run='zeros')\n"
        "show(watches=watches)"
    )
    assert found == {"watches": []}


@pytest.mark.parametrize("method", ["supports", "forward", "backward"])
def test_a_kernel_set_that_ends_the_program_is_told(method: str) -> None:
    found = found_by(
        f"Zeros.{method} = lambda *_: sys.exit(3)\n"
        "diagnosis = doctor.diagnose(run='zeros')\n"
        "show(ok=diagnosis.ok, reason=diagnosis.run.reason,\n"
        "     active=registry.current_flash_attention_impl())"
    )
    assert found == {"ok": False, "reason": "SystemExit: 3", "active": None}


@pytest.mark.parametrize(
    ("strict", "reason"),
    [
        ("0", f"{FORWARD_OP}: not today; {FORWARD_OP}_backward: not today"),
        ("1", f"CallDeclinedError: zeros-kernels does not serve this call of aten::{FORWARD_OP}"),
    ],
)
def test_a_call_that_is_declined_is_told_with_its_reason(strict: str, reason: str) -> None:
    found = found_by(
        "Zeros.supports = lambda self, call: 'not today'\n"
        "diagnosis = doctor.diagnose(run='zeros')\n"
        "show(ok=diagnosis.ok, reason=diagnosis.run.reason, device=diagnosis.run.device)",
        FLASH_ATTENTION_IMPL_STRICT=strict,
    )
    assert not found["ok"]
    assert found["device"] == "cpu"
    assert found["reason"].startswith(reason)


# Traps


OVERRIDE = f"""
library = torch.library.Library("aten", "IMPL")
warnings.simplefilter("ignore")
library.impl("{FORWARD_OP}", lambda *_: None, "CPU", allow_override=True)
"""


def test_another_library_on_top_of_the_routers_is_a_trap() -> None:
    found = found_by(
        "registry.activate_flash_attention_impl('zeros')\n"
        + OVERRIDE
        + "diagnosis = doctor.diagnose()\n"
        "show(kernel=diagnosis.calls[0].kernel, reason=diagnosis.calls[0].reason,\n"
        "     traps=[trap.found for trap in diagnosis.traps])"
    )
    assert found["kernel"] is None
    assert found["reason"] == f"another library has overridden aten::{FORWARD_OP}"
    assert found["traps"] == [
        f"another library's Python kernel stands in place of aten::{FORWARD_OP} (cpu) and takes "
        f"its calls"
    ]


def test_another_library_is_a_trap_before_anything_is_activated() -> None:
    found = found_by(
        OVERRIDE + "show(traps=[trap.found for trap in doctor.diagnose().traps])",
    )
    assert len(found["traps"]) == 1
    assert f"aten::{FORWARD_OP} (cpu)" in found["traps"][0]


def test_the_routers_themselves_are_no_trap() -> None:
    found = found_by(
        "none = doctor.diagnose().traps\n"
        "registry.activate_flash_attention_impl('zeros')\n"
        "active = doctor.diagnose().traps\n"
        "registry.restore_flash_attention_impl()\n"
        "show(traps=[*none, *active, *doctor.diagnose().traps])"
    )
    assert found == {"traps": []}


@pytest.mark.parametrize(
    ("code", "environment", "named"),
    [
        ("", {"TORCHINDUCTOR_CPP_WRAPPER": "1"}, "TORCHINDUCTOR_CPP_WRAPPER=1 is set"),
        (
            "import torch._inductor.config as config\nconfig.cpp_wrapper = True\n",
            {},
            "torch._inductor.config.cpp_wrapper is set",
        ),
    ],
)
def test_compiled_code_past_the_dispatcher_is_a_trap(
    code: str, environment: dict[str, str], named: str
) -> None:
    found = found_by(
        code + "show(traps=[trap.found for trap in doctor.diagnose().traps])", **environment
    )
    (trap,) = found["traps"]
    assert trap.startswith(named)


def test_interpreted_kernels_are_a_trap_only_where_there_is_a_gpu() -> None:
    found = found_by(
        "from flash_attention_registry.sdpa import diagnosis\n"
        "without = diagnosis.traps()\n"
        "torch.cuda.is_available = lambda: True\n"
        "show(without=without, beside=[trap.found for trap in diagnosis.traps()])",
        TRITON_INTERPRET="1",
    )
    assert found["without"] == []
    assert found["beside"][0].startswith("TRITON_INTERPRET=1 is set and there is a GPU")


# Facts


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build",
            "580.159.04",
        ),
        ("something else", None),
        (None, None),
    ],
    ids=["the closed module", "the open module", "an unknown text", "no driver"],
)
def test_the_driver_is_what_the_system_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, text: str | None, version: str | None
) -> None:
    from flash_attention_registry.sdpa import diagnosis

    file = tmp_path / "version"
    if text is not None:
        file.write_text(f"{text}\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(diagnosis, "Path", lambda _path: file)
    assert diagnosis.torch_facts().driver == version
