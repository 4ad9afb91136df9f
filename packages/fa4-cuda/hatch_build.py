"""Put the compiled kernels into the wheel; called by hatchling.

An editable installation compiles nothing: `hatch run build-cuda` does, when it is wanted, and until
then the package says that its kernels are not built.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CudaBuildHook(BuildHookInterface[Any]):
    """Compiles, and tags the wheel: for this platform, for every Python and every torch."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Requirements of this build: NVIDIA's compiler, where the machine has none.

        Of a build from the source distribution, that is. In a checkout installations are editable
        and compile nothing, and hatchling asks the same question for them.
        """
        kernels = self._kernels()
        in_checkout = not (Path(self.root) / "PKG-INFO").exists()
        if in_checkout or sys.platform != "linux" or kernels.find_nvcc() is not None:
            return []
        return list(kernels.COMPILER_WHEELS)

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library, unless the installation is editable."""
        if version == "editable":
            return
        kernels = self._kernels()
        if sys.platform != "linux":
            raise RuntimeError(
                f"fa4-cuda is built on Linux only, not on {sys.platform}; "
                "the implementation fa4-triton needs no build"
            )
        try:
            kernels.build()
        except kernels.BuildError as error:
            raise RuntimeError(f"fa4-cuda cannot be built: {error}") from None
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"

    def _kernels(self) -> ModuleType:
        """The script beside this file, which is on no path when hatchling runs."""
        spec = importlib.util.spec_from_file_location(
            "build_kernels", Path(self.root) / "build_kernels.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
