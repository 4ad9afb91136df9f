"""Implementations that installed distributions offer through entry points.

A distribution offers one by an entry point in group `ENTRY_POINT_GROUP`::

    [project.entry-points."flash_attention_registry.providers.v1"]
    my-impl = "my_package:register"

The entry point's name is the implementation's. Its value names a callable without arguments, in a
module that is cheap to import, that calls `register_flash_attention_impl("my-impl", ...)`. Names,
distributions and versions are read without importing anything of the provider; so are the
conflicts: a name that two distributions claim, and a provider made for another provider API, which
the number in the group's name tells. A distribution whose metadata cannot be read is left out and
told of.
"""

from __future__ import annotations

import _thread  # threading would double the time that importing this package takes

from flash_attention_registry.environment import why_disabled
from flash_attention_registry.errors import describe
from flash_attention_registry.fork import ForkSensitive
from flash_attention_registry.indivisible import call_and_finish
from flash_attention_registry.lock import Lock
from flash_attention_registry.registration import why_reserved
from flash_attention_registry.waiting import BusyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from flash_attention_registry.metadata import Declared

PROVIDER_API = 1
"""What a provider's callable may rely on; changes only when that does."""

GROUP_PREFIX = "flash_attention_registry.providers.v"
"""What the names of the entry-point groups of all provider APIs begin with."""

ENTRY_POINT_GROUP = f"{GROUP_PREFIX}{PROVIDER_API}"
"""The entry-point group that providers declare."""


class ProviderEntry:
    """One entry point as it was found; never changed.

    Attributes:
        name: The implementation's name.
        value: The object reference, such as ``"my_package:register"``.
        distribution: The distribution that declares it, or the folder of its metadata if those do
            not say; None if there is no folder either.
        version: That distribution's version, or None.
        conflict: Why it must not be imported, or None.
    """

    __slots__ = ("_point", "conflict", "distribution", "name", "value", "version")

    def __init__(self, declared: Declared) -> None:
        """Keep what the metadata says."""
        self._point = declared.point
        self.conflict: str | None = None
        self.name = declared.point.name
        self.value = declared.point.value
        self.distribution, self.version = declared.distribution, declared.version

    def register(self) -> None:
        """Import the provider and let it register its implementation.

        Raises:
            ValueError: The metadata name no function of a module.
        """
        names = self.value.partition("[")[0].strip().replace(":", ".", 1).split(".")
        if not all(name.isidentifier() for name in names):
            raise ValueError(f"its entry point reads {self.value!r}, not 'package.module:function'")
        self._point.load()()

    def origin(self) -> str:
        """Return who offers it, such as ``"my-package 1.2.0"``."""
        return (
            f"{self.distribution or 'a distribution without a name'} {self.version or ''}".strip()
        )


class Scan:
    """What the metadata of installed distributions says; never changed.

    Attributes:
        entries: What is offered, by name.
        unreadable: The files that could not be read, and why.
    """

    __slots__ = ("entries", "unreadable")

    def __init__(self, entries: dict[str, ProviderEntry], unreadable: tuple[str, ...]) -> None:
        """Keep both."""
        self.entries = entries
        self.unreadable = unreadable


class Discovery(ForkSensitive):
    """What is offered, what of it was loaded, and what of it could not be.

    Entry points are scanned once, at the first question; `refresh` forgets the scan. Loading is
    one thread's work at a time, and never part of a transition.
    """

    def __init__(self, prefix: str = GROUP_PREFIX) -> None:
        """Prepare to look into the groups that begin with `prefix`; nothing is read yet."""
        super().__init__()
        self._lock = Lock()
        self._prefix = prefix
        self.refresh()

    def renew(self) -> None:
        """Forget a loading that another thread had begun."""
        self._loading: dict[str, int] = {}

    def refresh(self) -> None:
        """Forget the scan and every failed loading: the next question reads the metadata again."""
        self._scan: Scan | None = None
        self._failures: dict[str, str] = {}

    def entries(self) -> dict[str, ProviderEntry]:
        """Return what is offered, by name, without importing it. Not to be changed."""
        return self._scanned().entries

    def unreadable(self) -> tuple[str, ...]:
        """Return the files of metadata that cannot be read, and why; what they offer is missing."""
        return self._scanned().unreadable

    def _scanned(self) -> Scan:
        # Without the lock, here and in forget: a thread in a transition must not wait for a thread
        # that loads a provider, because that one waits for the transition in order to register.
        scan = self._scan
        if scan is None:
            scan = self._scan = _scan(self._prefix)
        return scan

    def names_seen(self) -> Collection[str]:
        """Return the names that are offered as far as they are known without reading metadata."""
        scan = self._scan
        return () if scan is None else scan.entries

    def packages_seen(self) -> set[str]:
        """Return the top-level packages of the providers, as far as they are known like that."""
        scan = self._scan
        if scan is None:
            return set()
        return {entry.value.partition(":")[0].partition(".")[0] for entry in scan.entries.values()}

    def failure(self, name: str) -> str | None:
        """Return why the entry point of that name was not, or is not to be, loaded; or None.

        Raises:
            EnvironmentVariableError: The list of disabled implementations cannot be read.
        """
        entry = self.entries().get(name)
        conflict = None if entry is None else entry.conflict
        return why_disabled(name) or conflict or self._failures.get(name)

    def is_broken(self, name: str) -> bool:
        """Return whether the provider of that name was loaded and failed."""
        return name in self._failures

    def load(self, name: str, is_registered: Callable[[str], bool]) -> None:
        """Import the provider of `name` and let it register, unless that has been settled.

        A provider that fails is noted for `failure` and never raises here.

        Args:
            name: The name of an entry point that was found.
            is_registered: Tells whether an implementation is registered. What is registered
                already, by an explicit call, wins over an entry point not yet loaded.

        Raises:
            BusyError: Another thread is loading one or changing the registry, and this one must not
                wait for it.
        """
        self._lock.hold(lambda: self._load(name, is_registered))

    def _load(self, name: str, is_registered: Callable[[str], bool]) -> None:
        entry = self.entries().get(name)
        if entry is None or self.failure(name) is not None or name in self._loading:
            return
        if is_registered(name):
            return

        def register() -> None:
            self._loading[name] = _thread.get_ident()
            entry.register()

        try:
            call_and_finish(register, lambda: self._loading.pop(name, None))
        except BusyError:
            raise  # no fault of the provider, which is loaded again later
        except (Exception, SystemExit) as error:
            self._failures[name] = f"{entry.value} of {entry.origin()} raised {describe(error)}"
        else:
            if not is_registered(name):
                self._failures[name] = (
                    f"{entry.value} of {entry.origin()} ran without registering {name!r}"
                )

    def is_loading(self) -> bool:
        """Return whether the calling thread is loading a provider."""
        return self._lock.is_mine()

    def being_loaded(self, name: str) -> ProviderEntry | None:
        """Return the entry point of that name if the calling thread is loading it now."""
        if self._loading.get(name) != _thread.get_ident():
            return None
        return self.entries().get(name)

    def forget(self, name: str) -> None:
        """Leave that entry point out until the next `refresh`."""
        scan = self._scanned()
        entries = {k: v for k, v in scan.entries.items() if k != name}
        self._scan = Scan(entries, scan.unreadable)
        self._failures.pop(name, None)

    def save(self) -> tuple[Scan | None, dict[str, str]]:
        """Return the scan and the failures, for `restore`."""
        return self._scan, dict(self._failures)

    def restore(self, saved: tuple[Scan | None, dict[str, str]]) -> None:
        """Go back to what `save` returned."""
        self._scan, self._failures = saved[0], dict(saved[1])


def _scan(prefix: str) -> Scan:
    """Read the entry points of all provider APIs; one entry for each name, conflicts noted."""
    from flash_attention_registry.metadata import declared_in  # most processes need no scan

    declared, unreadable = declared_in(prefix)
    claims: dict[str, list[tuple[int, ProviderEntry]]] = {}
    for one in declared:
        api = one.point.group[len(prefix) :]
        if api.isdecimal():
            claims.setdefault(one.point.name, []).append((int(api), ProviderEntry(one)))
    entries = {name: _settle_claims(claimed) for name, claimed in claims.items()}
    return Scan(entries, tuple(unreadable))


def _settle_claims(claims: Sequence[tuple[int, ProviderEntry]]) -> ProviderEntry:
    """Return the entry that counts among those of one name, with its conflict if there is one."""
    usable = [entry for api, entry in claims if api == PROVIDER_API]
    chosen = (usable or [entry for _, entry in claims])[0]
    origins = sorted({entry.origin() for _, entry in claims})
    reserved = why_reserved(chosen.name)
    if reserved is not None:
        chosen.conflict = f"{chosen.origin()} declares {chosen.name!r}: {reserved}"
    elif len(origins) > 1:
        chosen.conflict = (
            f"{' and '.join(origins)} claim the name {chosen.name!r}, and none of them is "
            f"imported; uninstall all but one"
        )
    elif not usable:
        made_for = " and ".join(sorted({str(api) for api, _ in claims}))
        chosen.conflict = (
            f"{chosen.origin()} is made for provider API {made_for}, and this "
            f"flash-attention-registry has provider API {PROVIDER_API}; install versions of both "
            f"that fit"
        )
    elif len({entry.value for entry in usable}) > 1:
        values = " and ".join(entry.value for entry in usable)
        chosen.conflict = f"{chosen.origin()} declares the name twice, as {values}"
    return chosen
