"""A diagnosis: what it concludes from what it finds, as data and as text. Torch is a stand-in."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from flash_attention_registry import (
    EnvironmentVariableError,
    RequestUnavailableError,
    autoload,
    before_using_cuda,
    default,
    doctor,
    layout,
)
from flash_attention_registry.doctor.findings import (
    AttentionRun,
    Diagnosis,
    Gpu,
    Request,
    TorchFacts,
    Trap,
    TypicalCall,
)

IMPL = "FLASH_ATTENTION_IMPL"
NO_DEVICE = AttentionRun(None, None, None, False, {}, "torch is not installed")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing asked for, and lines of a known length."""
    for name in (IMPL, f"{IMPL}_STRICT", f"{IMPL}_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(autoload, "_called", False)


@pytest.fixture
def here(registry, monkeypatch):
    """The registry of the process, in which only a test's own implementations are."""
    monkeypatch.setattr(default, "_registry", registry)
    return registry


@pytest.fixture
def ready(here, kernels):
    """The implementations `good` and `other`, and `absent`, which cannot run; all of a family."""
    for name, options in {
        "good": {"priority": 1},
        "other": {},
        "absent": {"availability": lambda: "no GPU"},
    }.items():
        here.register(name, register_fn=kernels.installer(name), family="FA4", **options)
    return here


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


class TorchSide(ModuleType):
    """What stands in for `flash_attention_registry.sdpa.diagnosis`, on torch 2.13 with a GPU."""

    def __init__(self):
        super().__init__("flash_attention_registry.sdpa.diagnosis")
        self.facts = TorchFacts("2.13.0", "13.0", "91900", "580.1", (Gpu(0, "H200", "9.0"),))
        self.found = ()
        self.result = AttentionRun(None, None, "cuda", None, {}, "no implementation is active")
        self.calls_of = {}
        self.asked_to_run = []

    def torch_facts(self):
        return self.facts

    def counts(self):
        return self.calls_of

    def traps(self):
        return self.found

    def typical_calls(self):
        active = default.current_flash_attention_impl()
        return (
            TypicalCall("causal", "cuda", "CUDNN_ATTENTION", active or "stock", None),
            TypicalCall("masked", "cuda", "CUDNN_ATTENTION", "stock", "masks are not supported"),
            TypicalCall("odd", "cuda", None, None, None),
        )

    def run_once(self, name):
        self.asked_to_run.append(name)
        return dataclasses.replace(self.result, asked=name)


@pytest.fixture
def torch_side(monkeypatch):
    """A torch of which only this package's own questions are answered."""
    side = TorchSide()
    sdpa = ModuleType("flash_attention_registry.sdpa")
    sdpa.diagnosis = side
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "flash_attention_registry.sdpa", sdpa)
    monkeypatch.setitem(sys.modules, "flash_attention_registry.sdpa.diagnosis", side)
    return side


@pytest.fixture
def broken_torch(monkeypatch, failing):
    """Return a function after which `import torch` raises an error."""

    def break_torch(error):
        monkeypatch.setattr(doctor, "import_module", lambda name: failing(error)())
        monkeypatch.delitem(sys.modules, "torch._C", raising=False)  # of another test

    return break_torch


def section(diagnosis, title):
    """The lines of a section of the text."""
    (found,) = [part for part in str(diagnosis).split("\n\n") if part.startswith(title)]
    return [line[2:] for line in found.splitlines()[1:]]


# Torch that is not there, or of no use


def test_without_torch_it_says_so_and_goes_on(ready, no_torch):
    diagnosis = doctor.diagnose()
    assert diagnosis.ok
    assert diagnosis.torch_problem == "torch is not installed"
    assert diagnosis.summary == "No kernels can be used: torch is not installed."
    assert [report.name for report in diagnosis.implementations] == ["absent", "good", "other"]
    assert (diagnosis.torch, diagnosis.calls, diagnosis.run) == (None, (), None)
    assert "torch is not installed" in section(diagnosis, "Versions")


def test_without_torch_what_is_asked_for_is_not_active(ready, no_torch, monkeypatch):
    monkeypatch.setenv(IMPL, "good")
    diagnosis = doctor.diagnose()
    assert diagnosis.request == Request(("good",), "failed", {"good": "torch is not installed"})
    assert diagnosis.problems == (
        f"{IMPL}=good asks for what is not active:\n  good: torch is not installed",
    )


@pytest.mark.parametrize("run", [True, "good"])
def test_without_torch_a_call_cannot_be_made(ready, no_torch, run):
    diagnosis = doctor.diagnose(run)
    assert not diagnosis.ok
    asked = None if run is True else run
    assert diagnosis.run == dataclasses.replace(NO_DEVICE, asked=asked)
    assert section(diagnosis, "The call that was") == ["it was not made: torch is not installed"]


def test_a_torch_that_cannot_be_imported_is_a_problem(ready, broken_torch):
    error = ImportError("libtorch.so is damaged")
    error.__cause__ = OSError("no such file")
    broken_torch(error)
    diagnosis = doctor.diagnose()
    told = (
        "torch cannot be imported: ImportError: libtorch.so is damaged because of OSError: no such "
        "file"
    )
    assert diagnosis.problems == (told,)
    assert diagnosis.torch_problem == told
    assert len(diagnosis.implementations) == 3


def test_nobody_is_asked_after_an_import_that_failed_late(ready, broken_torch, monkeypatch):
    """Whoever imported torch again would report that it cannot be imported twice."""
    ready.register("asked", register_fn=len, availability=pytest.fail)
    broken_torch(RuntimeError("a hook failed"))
    monkeypatch.setitem(sys.modules, "torch._C", ModuleType("torch._C"))
    diagnosis = doctor.diagnose()
    assert diagnosis.implementations == ()
    assert diagnosis.problems == ("torch cannot be imported: RuntimeError: a hook failed",)
    (told,) = section(diagnosis, "Implementations")
    assert told.startswith("torch cannot be imported a second time")
    assert told.endswith("Repair that to see them.")


def test_what_is_missing_has_not_failed_late(ready, no_torch, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._C", ModuleType("torch._C"))
    assert len(doctor.diagnose().implementations) == 3


def test_a_torch_whose_import_ends_the_program_is_a_problem(ready, broken_torch):
    broken_torch(SystemExit(3))
    (problem,) = doctor.diagnose().problems
    assert problem == "torch cannot be imported: SystemExit: 3"


def test_an_interrupt_while_torch_is_imported_goes_through(ready, broken_torch):
    broken_torch(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        doctor.diagnose()


def test_a_module_that_torch_lacks_is_not_torch(ready, broken_torch):
    broken_torch(ModuleNotFoundError("No module named 'sympy'", name="sympy"))
    assert "No module named 'sympy'" in doctor.diagnose().torch_problem


def test_a_torch_that_is_too_old_is_a_problem(ready, torch_side, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attention_registry.sdpa", None)
    diagnosis = doctor.diagnose(run=True)
    assert "which must be 2.11 or newer" in diagnosis.torch_problem
    assert diagnosis.problems[0] == diagnosis.torch_problem
    assert diagnosis.run.served is False


# A strict environment that ended the import of torch


@pytest.fixture
def refused(ready, broken_torch):
    """Return a function after which `import torch` is ended by an error of this package."""

    def refuse(error):
        ended = RuntimeError("Failed to load the backend extension")
        ended.__cause__ = error
        broken_torch(ended)
        ready.register("asked", register_fn=len, availability=pytest.fail)

    return refuse


def test_what_ended_the_import_gives_the_reason(refused, monkeypatch):
    monkeypatch.setenv(IMPL, "good")
    refused(RequestUnavailableError("...", {"good": "its activation failed:\nno memory"}))
    diagnosis = doctor.diagnose()
    assert diagnosis.request.reasons == {"good": "its activation failed:\nno memory"}
    assert diagnosis.problems == (
        f"{IMPL}=good asks for what is not active:\n  good: its activation failed: no memory",
    )
    assert section(diagnosis, "Environment")[-1] == "  good: its activation failed: no memory"
    assert f"RequestUnavailableError ended the import of torch, because {IMPL}_STRICT is set" in (
        diagnosis.summary
    )


def test_nobody_is_asked_who_would_import_torch_again(refused):
    refused(RequestUnavailableError("..."))
    diagnosis = doctor.diagnose()
    assert diagnosis.implementations == ()
    (told,) = section(diagnosis, "Implementations")
    assert told.startswith("torch cannot be imported a second time")


def test_a_bad_value_that_ended_the_import_is_told_once(refused, monkeypatch):
    monkeypatch.setenv(IMPL, "a,,b")
    refused(EnvironmentVariableError("..."))
    (problem,) = doctor.diagnose().problems
    assert "has an empty place" in problem


# The environment


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        (IMPL, "FA4, good,native", "FA4, then good, then native"),
        (IMPL, " ", "nothing is asked for"),
        (f"{IMPL}_STRICT", "yes", "what is not served is an error"),
        (f"{IMPL}_STRICT", "0", "what is not served runs on torch's own kernels"),
        (f"{IMPL}_DISABLE", "good,FA4", "FA4, good"),
        (f"{IMPL}_DISABLE", None, "nothing"),
    ],
)
def test_variables_are_told_as_they_are_understood(
    ready, no_torch, monkeypatch, name, value, meaning
):
    if value is not None:
        monkeypatch.setenv(name, value)
    diagnosis = doctor.diagnose()
    (variable,) = [one for one in diagnosis.environment if one.name == name]
    assert (variable.value, variable.meaning, variable.problem) == (value, meaning, None)
    line = f"{name} is not set" if value is None else f"{name}={value}: {meaning}"
    assert " ".join(line.split()) in [
        " ".join(one.split()) for one in section(diagnosis, "Environment")
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [(IMPL, "native,good"), (f"{IMPL}_STRICT", "maybe"), (f"{IMPL}_DISABLE", ",")],
)
def test_a_value_that_cannot_be_understood_is_a_problem(
    ready, torch_side, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    diagnosis = doctor.diagnose()
    (variable,) = [one for one in diagnosis.environment if one.name == name]
    assert variable.meaning is None
    assert diagnosis.problems == (variable.problem,)
    assert any(variable.problem in line for line in section(diagnosis, "Environment"))


def test_a_value_that_cannot_be_understood_is_why_nothing_is_active(ready, torch_side, monkeypatch):
    monkeypatch.setenv(IMPL, "good")
    monkeypatch.setenv(f"{IMPL}_STRICT", "maybe")
    monkeypatch.setattr(autoload, "_called", True)
    diagnosis = doctor.diagnose()
    assert diagnosis.request.reasons == {
        "good": "usable, but not active, because an environment variable cannot be understood"
    }


# What became of the request


@pytest.mark.parametrize(
    ("asked", "active", "request_"),
    [
        pytest.param("", None, Request(), id="nothing is asked for"),
        pytest.param("", "good", Request(), id="the program has decided"),
        pytest.param("good", "good", Request(("good",), "active"), id="a name"),
        pytest.param("FA4", "good", Request(("FA4",), "active"), id="a family"),
        pytest.param("FA4", "other", Request(("FA4",), "active"), id="its second best"),
        pytest.param("native", None, Request(("native",), "native"), id="native"),
        pytest.param(
            "absent,nope,good",
            "good",
            Request(
                ("absent", "nope", "good"),
                "active",
                {
                    "absent": "not available: no GPU",
                    "nope": "there is no implementation and no family 'nope'. "
                    "Implementations: absent, good, other. Families: FA4.",
                },
            ),
            id="the last of a list",
        ),
        pytest.param(
            "absent,native",
            None,
            Request(("absent", "native"), "native", {"absent": "not available: no GPU"}),
            id="native as the last resort",
        ),
        pytest.param(
            "good",
            "other",
            Request(("good",), "failed", {"good": "usable, but 'other' is active instead"}),
            id="another is active",
        ),
        pytest.param(
            "native",
            "good",
            Request(("native",), "failed", {"native": "usable, but 'good' is active instead"}),
            id="native, but something is active",
        ),
    ],
)
def test_the_request_is_compared_with_what_is_active(
    ready, torch_side, monkeypatch, asked, active, request_
):
    monkeypatch.setenv(IMPL, asked)
    if active is not None:
        ready.activate(active)
    diagnosis = doctor.diagnose()
    assert diagnosis.request == request_
    assert diagnosis.active == active
    assert diagnosis.ok == (request_.state != "failed")


@pytest.mark.parametrize(
    ("switch", "called", "reason"),
    [
        pytest.param("0", False, "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from", id="off"),
        pytest.param("1", False, "no installed distribution declares the hook", id="no hook"),
        pytest.param(None, False, "no installed distribution declares the hook", id="unset"),
        pytest.param(None, True, "its activation failed with a warning", id="called"),
    ],
)
def test_what_is_usable_and_not_active_has_a_reason(
    ready, torch_side, monkeypatch, switch, called, reason
):
    monkeypatch.setenv(IMPL, "good")
    monkeypatch.setattr(autoload, "_called", called)
    if switch is not None:
        monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", switch)
    diagnosis = doctor.diagnose()
    assert diagnosis.request.state == "failed"
    assert reason in diagnosis.request.reasons["good"]


# What waits for the first call on a GPU


@pytest.fixture
def waiting(ready, kernels, torch_side, monkeypatch):
    """Return a function that makes the environment ask for what needs the GPU."""

    def wait(reason):
        def availability():
            before_using_cuda()
            return reason

        ready.register("gpu", register_fn=kernels.installer("gpu"), availability=availability)
        monkeypatch.setenv(IMPL, "gpu")
        ready.request.honour(lambda *_: None)
        assert ready.request.pending == ("gpu",)

    return wait


def test_what_waits_for_the_gpu_is_settled(waiting):
    waiting(None)
    diagnosis = doctor.diagnose()
    assert diagnosis.request == Request(("gpu",), "active")
    assert diagnosis.active == "gpu"


@pytest.mark.filterwarnings("ignore:FLASH_ATTENTION_IMPL=gpu asks")
def test_what_waits_and_cannot_be_activated_has_failed(waiting):
    waiting("too old")
    assert doctor.diagnose().request.reasons == {"gpu": "not available: too old"}


def test_what_a_strict_environment_makes_fail_has_failed(waiting, monkeypatch):
    waiting("too old")
    monkeypatch.setenv(f"{IMPL}_STRICT", "1")
    diagnosis = doctor.diagnose()
    assert diagnosis.request.state == "failed"
    assert (
        "Flash attention impl 'gpu' is not available: too old" in (diagnosis.request.reasons["gpu"])
    )


def test_what_cannot_be_settled_yet_is_pending(waiting, ready, monkeypatch):
    waiting(None)
    monkeypatch.setattr(ready.request, "settle", lambda: None)
    diagnosis = doctor.diagnose()
    assert diagnosis.request.state == "pending"
    assert diagnosis.ok
    assert diagnosis.summary.endswith("is settled at the first call on a GPU.")
    assert f"{IMPL} asks for gpu: settled at the first attention call on a GPU" in (
        section(diagnosis, "Environment")
    )


# Traps


def test_a_hook_that_is_switched_off_is_a_trap_if_it_is_needed(ready, no_torch, monkeypatch):
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert doctor.diagnose().traps == ()
    monkeypatch.setenv(IMPL, "native")
    (trap,) = doctor.diagnose().traps
    assert f"{IMPL} is set, but TORCH_DEVICE_BACKEND_AUTOLOAD=0" in trap.found
    assert "activate_requested_flash_attention_impl()" in trap.remedy


def test_a_disabled_name_that_nothing_has_is_a_trap(ready, no_torch, monkeypatch):
    monkeypatch.setenv(f"{IMPL}_DISABLE", "good,FA4,god")
    (trap,) = doctor.diagnose().traps
    assert "names 'god', which is no implementation and no family here" in trap.found


def test_a_disabled_family_is_no_trap_where_its_members_are_disabled_too(
    site, installed, no_torch, monkeypatch
):
    site.install("provider", "1 / 0", provides={"x": "provider:register"})
    monkeypatch.setenv(f"{IMPL}_DISABLE", f"{','.join(installed.names())},letters")
    assert doctor.diagnose().traps == ()


def test_disabled_names_are_not_judged_where_nobody_could_be_asked(refused, monkeypatch):
    monkeypatch.setenv(f"{IMPL}_DISABLE", "good")
    refused(RequestUnavailableError("..."))
    assert doctor.diagnose().traps == ()


def test_traps_of_torch_are_told_too(ready, torch_side):
    assert section(doctor.diagnose(), "Traps") == ["none found"]
    torch_side.found = (Trap("a pit", "Go round it."),)
    diagnosis = doctor.diagnose()
    assert diagnosis.traps == torch_side.found
    assert section(diagnosis, "Traps") == ["a pit", "  Go round it."]


# What torch tells


def test_it_tells_about_torch_and_its_gpus(ready, torch_side):
    assert section(doctor.diagnose(), "Versions")[-3:] == [
        "torch says: 2.13.0, CUDA 13.0, cuDNN 91900",
        "NVIDIA driver: 580.1",
        "GPU 0: H200, compute capability 9.0",
    ]


def test_it_tells_that_there_is_no_gpu(ready, torch_side):
    torch_side.facts = TorchFacts("2.13.0+cpu", None, None, None, ())
    assert section(doctor.diagnose(), "Versions")[-3:] == [
        "torch says: 2.13.0+cpu, CUDA none, cuDNN none",
        "NVIDIA driver: unknown",
        "torch sees no GPU",
    ]


def test_it_tells_where_typical_calls_go(ready, torch_side):
    ready.activate("good")
    assert section(doctor.diagnose(), "Typical calls on cuda") == [
        "causal: torch chooses CUDNN_ATTENTION; good runs it",
        "masked: torch chooses CUDNN_ATTENTION; stock runs it (masks are not supported)",
        "odd: torch does not say which backend it chooses; which kernel runs cannot be told",
    ]


def test_it_tells_the_counts_of_the_process(ready, torch_side):
    assert section(doctor.diagnose(), "Calls of this process") == ["none was counted"]
    torch_side.calls_of = {"op": {"served": 2, "declined": {"dropout": 3, "mask": 1}}}
    diagnosis = doctor.diagnose()
    assert diagnosis.counts == torch_side.calls_of
    assert section(diagnosis, "Calls of this process") == [
        "op: 2 served, 4 on stock",
        "  3 on stock: dropout",
        "  1 on stock: mask",
    ]


def test_versions_of_providers_are_told(site, installed, no_torch):
    site.install("provider", "", provides={"x": "provider:register"}, distribution="some-dist")
    site.install("nameless", "", provides={"y": "nameless:register"}, distribution=None)
    packages = doctor.diagnose().packages
    assert packages["some-dist"] == "1.2.3"
    assert next(iter(packages)) == "flash-attention-registry"
    assert list(packages)[-2:] == ["torch", "triton"]


def test_a_package_that_is_not_installed_has_no_version(ready, no_torch, monkeypatch, failing):
    monkeypatch.setattr(doctor, "version", lambda name: failing(KeyError(name))())
    diagnosis = doctor.diagnose()
    assert set(diagnosis.packages.values()) == {None}
    assert "triton (no such distribution is installed)" in section(diagnosis, "Versions")


# The answer


@pytest.mark.parametrize(
    ("asked", "active", "summary"),
    [
        ("", None, "Torch's own kernels run: no implementation is active, and none is asked for."),
        ("", "good", "good is active and would run 1 of 3 typical calls."),
        ("native", None, f"Torch's own kernels run, as {IMPL} allows."),
        ("nope", None, f"Torch's own kernels run: what {IMPL} asks for is not active."),
    ],
)
def test_the_answer_comes_first(ready, torch_side, monkeypatch, asked, active, summary):
    monkeypatch.setenv(IMPL, asked)
    if active is not None:
        ready.activate(active)
    diagnosis = doctor.diagnose()
    assert diagnosis.summary == summary
    assert str(diagnosis).startswith(f"{summary}\n\n")


def test_kernels_that_were_installed_past_the_registry_are_named(ready, torch_side):
    torch_side.typical_calls = lambda: (TypicalCall("causal", "cpu", "FLASH", "mine", None),)
    diagnosis = doctor.diagnose()
    assert diagnosis.active is None
    assert diagnosis.summary == "mine is active and would run 1 of 1 typical calls."


# The call that is made


def test_no_call_is_made_unless_it_is_asked_for(ready, torch_side):
    assert doctor.diagnose().run is None
    assert torch_side.asked_to_run == []


@pytest.mark.parametrize(("run", "name"), [(True, None), ("good", "good")])
def test_a_call_is_made_under_the_name_that_is_given(ready, torch_side, run, name):
    assert doctor.diagnose(run).run.asked == name
    assert torch_side.asked_to_run == [name]


@pytest.mark.parametrize(
    ("asked", "result", "said", "line", "ok"),
    [
        pytest.param(
            "good",
            SimpleNamespace(active="good", served=True, reason=None),
            "One call was really made under good: it was served.",
            "served",
            True,
            id="served",
        ),
        pytest.param(
            True,
            SimpleNamespace(active="good", served=False, reason="too long"),
            "One call was really made under good: it was NOT served.",
            "NOT served: too long",
            False,
            id="declined",
        ),
        pytest.param(
            True,
            SimpleNamespace(active=None, served=None, reason="no implementation is active"),
            "One call was really made: no implementation is active.",
            "no implementation is active",
            True,
            id="stock",
        ),
        pytest.param(
            True,
            SimpleNamespace(active=None, served=False, reason="out of memory"),
            "One call was really made: it was NOT served.",
            "NOT served: out of memory",
            False,
            id="stock failed",
        ),
    ],
)
def test_what_came_of_the_call_is_told(ready, torch_side, asked, result, said, line, ok):
    counts = {"op": {"served": 1, "declined": {}}}
    torch_side.result = AttentionRun(
        None, result.active, "cuda", result.served, counts, result.reason
    )
    diagnosis = doctor.diagnose(asked)
    assert diagnosis.summary.endswith(said)
    assert diagnosis.ok == ok
    assert section(diagnosis, "The call that was") == [
        "scaled_dot_product_attention, bfloat16, causal, forward and backward, on cuda",
        f"active meanwhile: {result.active or 'nothing'}",
        "op: 1 served, 0 on stock",
        line,
    ]


def test_a_call_that_was_not_served_is_a_problem(ready, torch_side):
    torch_side.result = AttentionRun(None, "good", "cuda", False, {}, "too long")
    diagnosis = doctor.diagnose("good")
    assert diagnosis.problems == ("The call under good was not served: too long",)
    assert section(diagnosis, "Problems") == list(diagnosis.problems)


# As data


def test_it_can_be_written_as_json_and_its_keys_are_stable(ready, torch_side, monkeypatch):
    monkeypatch.setenv(IMPL, "absent,native")
    torch_side.found = (Trap("a pit", "Go round it."),)
    document = json.loads(json.dumps(doctor.diagnose(run=True).as_dict()))
    assert {key: _shape(value) for key, value in document.items()} == {
        "ok": "bool",
        "summary": "str",
        "problems": [],
        "python": "str",
        "packages": ["flash-attention-registry", "torch", "triton"],
        "torch": ["version", "cuda", "cudnn", "driver", "gpus"],
        "torch_problem": "NoneType",
        "environment": [["name", "value", "meaning", "problem"]],
        "request": ["names", "state", "reasons"],
        "active": "NoneType",
        "implementations": [
            [
                "name",
                "distribution",
                "version",
                "family",
                "priority",
                "available",
                "unavailable_reason",
                "recommended",
                "not_recommended_reason",
                "active",
            ]
        ],
        "not_explained": "NoneType",
        "counts": [],
        "calls": [["call", "device", "backend", "kernel", "reason"]],
        "traps": [["found", "remedy"]],
        "hints": ["str"],
        "run": ["asked", "active", "device", "served", "counts", "reason"],
    }
    assert document["torch"]["gpus"] == [
        {"index": 0, "name": "H200", "compute_capability": "9.0"},
    ]


def _shape(value):
    """The keys of an object, the shape of a list's first item, the type of anything else."""
    if isinstance(value, dict):
        return list(value)
    if isinstance(value, list):
        return [_shape(one) for one in value[:1]]
    return type(value).__name__


def test_a_diagnosis_cannot_be_changed(ready, no_torch):
    diagnosis = doctor.diagnose()
    assert isinstance(diagnosis, Diagnosis)
    with pytest.raises(dataclasses.FrozenInstanceError):
        diagnosis.summary = "all is well"


# Its text


def test_hints_are_always_given(ready, no_torch):
    assert section(doctor.diagnose(), "Always so") == list(doctor.HINTS)


def test_lines_are_folded_at_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    assert layout.wrapped("  name: " + "word " * 12, indent=2) == (
        "    name: word word word word word word word\n      word word word word word"
    )


def test_a_very_narrow_terminal_folds_by_itself(monkeypatch):
    monkeypatch.setenv("COLUMNS", "5")
    assert layout.terminal_width() == layout.NARROWEST


def test_columns_are_as_wide_as_they_need_be():
    assert layout.columns([("NAME", "ACTIVE"), ("fa4-triton", "-")]) == (
        "NAME        ACTIVE\nfa4-triton  -"
    )
