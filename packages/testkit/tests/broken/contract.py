"""Providers that break what the registry and the installation rely on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plain_kernel_set import PlainKernelSet
from standard_run import NAME, Stage, device_type, offer

from broken.table import found_by
from flash_attention_registry import register_flash_attention_impl
from flash_attention_registry.discovery import ENTRY_POINT_GROUP
from flash_attention_registry.sdpa import install

HANDLE = ("test_handle_can_be_removed_twice", "test_second_removal_leaves_others_alone")
"""What else needs a handle that works."""


class Handle:
    """Removes as it is told to."""

    def __init__(self, remove: Any) -> None:
        self.remove = remove


# Handles


@found_by("test_restore_leaves_no_kernels", "test_restore_gives_stocks_bits")
def a_handle_that_does_not_remove(stage: Stage) -> None:
    def register_fn() -> Handle:
        install(PlainKernelSet(), device_type())
        return Handle(lambda: None)

    register_flash_attention_impl(NAME, register_fn=register_fn)


@found_by("test_restore_leaves_no_kernels", "test_restore_gives_stocks_bits", also=HANDLE)
def no_handle(stage: Stage) -> None:
    register_flash_attention_impl(
        NAME, register_fn=lambda: install(PlainKernelSet(), device_type()) and None
    )


@found_by("test_restore_leaves_no_kernels")
def a_handle_on_one_of_two_devices(stage: Stage) -> None:
    def register_fn() -> Any:
        handles = {device: install(PlainKernelSet(), device) for device in ("cpu", "cuda")}
        return handles[device_type()]

    register_flash_attention_impl(NAME, register_fn=register_fn)


@found_by("test_handle_can_be_removed_twice", also=("test_second_removal_leaves_others_alone",))
def a_handle_that_raises_the_second_time(stage: Stage) -> None:
    def register_fn() -> Handle:
        handles = [install(PlainKernelSet(), device_type())]
        return Handle(lambda: handles.pop().remove())

    register_flash_attention_impl(NAME, register_fn=register_fn)


@found_by("test_second_removal_leaves_others_alone")
def a_handle_that_removes_whoever_is_there(stage: Stage) -> None:
    def register_fn() -> Handle:
        install(PlainKernelSet(), device_type())
        return Handle(lambda: install(PlainKernelSet(), device_type()).remove())

    register_flash_attention_impl(NAME, register_fn=register_fn)


# Distributions

MODULE = f"""
from flash_attention_registry import register_flash_attention_impl

def register():
    register_flash_attention_impl("{NAME}", register_fn=install)

def install():
    from flash_attention_registry import sdpa
    from plain_kernel_set import PlainKernelSet
    return sdpa.install(PlainKernelSet(), "{device_type()}")
"""
REQUIRED = "flash-attention-registry>=0.1,<1"


def installed(
    stage: Stage,
    module: str = MODULE,
    *,
    distribution: str = "kit-broken-dist",
    version: str = "1.0",
    requires: str = REQUIRED,
) -> None:
    """Let a distribution appear that offers ``NAME``."""
    name = distribution.replace("-", "_")
    stage.entry_points.distribution(
        distribution,
        {ENTRY_POINT_GROUP: {NAME: f"{name}:register"}},
        version=version,
        modules={name: module},
    )
    metadata = stage.entry_points.folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.write_text(f"{metadata.read_text()}Requires-Dist: {requires}\n")


@found_by("test_import_is_light")
def a_module_that_imports_torch(stage: Stage) -> None:
    installed(stage, "import torch\n" + MODULE)


@found_by("test_registering_is_light")
def a_registration_that_imports_torch(stage: Stage) -> None:
    installed(stage, MODULE.replace("def register():", "def register():\n    import torch"))


@found_by("test_import_activates_nothing", also=("test_import_is_light",))
def a_module_that_installs(stage: Stage) -> None:
    installed(stage, MODULE + "\ninstall()\n")


@found_by(
    "test_registering_again_keeps_one_entry",
    also=("test_activating_after_registering_again_serves",),
)
def a_registration_that_refuses_a_second_one(stage: Stage) -> None:
    refusal = (
        "    from flash_attention_registry import default_registry\n"
        f'    assert default_registry().registration("{NAME}") is None\n'
    )
    installed(stage, MODULE.replace("def register():\n", f"def register():\n{refusal}"))


@found_by("test_registering_again_keeps_one_entry")
def a_registration_with_a_new_name_each_time(stage: Stage) -> None:
    more = (
        f'    register_flash_attention_impl("{NAME}-" + str(len(names)), register_fn=install)\n'
        "    names.append(0)\n"
    )
    installed(stage, "names = []\n" + MODULE.replace("\n\ndef install", f"\n{more}\ndef install"))


@found_by("test_entry_point_registers_its_name", also=("test_registering_again_keeps_one_entry",))
def an_entry_point_that_registers_another_name(stage: Stage) -> None:
    installed(stage, MODULE.replace(f'"{NAME}"', f'"{NAME}-2"'))
    offer(PlainKernelSet)


@found_by(
    "test_activation_after_restore_serves_again",
    also=(
        *HANDLE,
        "test_failed_activation_of_another_keeps_it_active",
        "test_restore_gives_stocks_bits",
        "test_torchs_forward_may_precede",
    ),
)
def kernels_that_can_be_installed_once(stage: Stage) -> None:
    once = MODULE.replace("register():\n", "register():\n    once = [install]\n")
    installed(stage, once.replace("register_fn=install", "register_fn=lambda: once.pop()()"))


@found_by("test_entry_point_is_of_this_api_and_nobody_elses")
def a_name_that_two_distributions_claim(stage: Stage) -> None:
    installed(stage)
    installed(stage, distribution="kit-broken-fork")
    offer(PlainKernelSet)


@found_by("test_distribution_has_a_version")
def a_distribution_without_a_version(stage: Stage) -> None:
    installed(stage, version="latest")


@found_by("test_distribution_requires_the_registry_within_bounds")
def a_requirement_without_an_upper_bound(stage: Stage) -> None:
    installed(stage, requires="flash-attention-registry>=0.1")


@found_by("test_distribution_requires_the_registry_within_bounds")
def a_requirement_of_something_else(stage: Stage) -> None:
    installed(stage, requires="torch>=2.11,<3")


# What is asked and declared


@found_by("test_recommendation_check_answers")
def a_recommendation_that_raises(stage: Stage) -> None:
    def recommended() -> str | None:
        raise KeyError("sm_90a")

    offer(PlainKernelSet, recommended=recommended)


@found_by("test_kernel_set_has_a_name")
class KernelsWithoutAName(PlainKernelSet):
    name = " "


@found_by("test_capabilities_are_well_formed")
class DeclaresWhatThereIsNot(PlainKernelSet):
    capabilities = replace(
        PlainKernelSet.capabilities, features=PlainKernelSet.capabilities.features | {"dropout"}
    )
