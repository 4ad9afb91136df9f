"""What `FLASH_ATTENTION_IMPL` asks for, and when it is activated."""

from __future__ import annotations

import sys

from flash_attention_registry import environment
from flash_attention_registry.cuda import without_cuda
from flash_attention_registry.environment import IMPL, NATIVE
from flash_attention_registry.errors import (
    CudaNeededError,
    EnvironmentVariableError,
    RegistryWarning,
    RequestUnavailableError,
    RestoreError,
    describe,
    text_of,
)
from flash_attention_registry.fork import ForkSensitive
from flash_attention_registry.indivisible import call_and_finish
from flash_attention_registry.lock import Lock
from flash_attention_registry.waiting import BusyError, without_waiting
from flash_attention_registry.warn import warn_or_log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from flash_attention_registry.registry import Registry

    AwaitFirstCall = Callable[[str, Callable[[], bool]], object]


class EnvironmentRequest(ForkSensitive):
    """What the environment asks a registry for, from `import torch` until it is settled.

    It is settled at once where that needs no CUDA. Where it does, it is pending: settled at the
    first attention call on a GPU, unless the program activates or restores something before that.
    It is pending too while the provider cannot be used yet, since its own import is what imports
    torch: settled by the next transition, or the first attention call on any device, after that.
    """

    def __init__(self, registry: Registry) -> None:
        """Ask for nothing yet."""
        self._registry = registry
        # What the program has decided last, a new object each time, and what is pending with what
        # it had decided by then: anything newer makes that void, in one step for all threads.
        self._decision = object()
        self._asked: tuple[object, tuple[str, ...]] = (self._decision, ())
        self._awaits_first_call = False
        self._await_first_call: AwaitFirstCall | None = None
        self._lock = Lock()
        super().__init__()

    def renew(self) -> None:
        """Forget that another thread was settling; what is pending is so in the child as well."""
        self._settling = False

    @property
    def pending(self) -> tuple[str, ...]:
        """The names that are not settled yet, the most wanted first."""
        decision, names = self._asked
        return names if decision is self._decision else ()

    def ask(self, names: tuple[str, ...]) -> None:
        """Make these names pending, until they are settled or the program decides itself."""
        self._asked = (self._decision, names)

    def supersede(self) -> None:
        """Drop what is pending, because the program has decided itself.

        Also while another thread settles it, which then activates nothing more. What the settling
        thread does itself is no decision of the program's.
        """
        if not (self._settling and self._lock.is_mine()):
            self._decision = object()

    def activate(self) -> None:
        """Activate what the environment asks for, now; nothing happens if it asks for nothing.

        Raises:
            EnvironmentVariableError: Its value cannot be understood.
            RequestUnavailableError: Nothing that it asks for could be activated.
            RestoreError: It is active now, but the `remove()` of the one before raised.
            ReentrantTransitionError: Called inside a transition.
        """
        self._registry.refuse_reentry(f"activate what {IMPL} asks for")
        self._lock.hold(self._read_and_settle)

    def _read_and_settle(self) -> None:
        self.ask(environment.requested())
        self._settle()

    def honour(self, await_first_call: AwaitFirstCall) -> None:
        """Activate what the environment asks for, or leave it pending if that needs CUDA.

        If nothing can be activated there is a warning; in a strict environment the error. What the
        program has activated before is left alone.

        Args:
            await_first_call: Called with a device type and a function if it is pending; arranges
                that the next attention call there calls the function, until that returns True.

        Raises:
            EnvironmentVariableError: The value of it or of another variable of this package cannot
                be understood, in a strict environment.
            RequestUnavailableError: Nothing could be activated, in a strict environment.
        """
        self._await_first_call = await_first_call
        try:
            environment.check()  # the other variables too: who set one wants to know
            wanted = environment.requested()
        except EnvironmentVariableError as error:
            _raise_or_warn(error)
            return
        if self._registry.current() is None:
            self.ask(wanted)
            self._awaits_first_call = False
            self.resume()

    def resume(self) -> None:
        """Go on with `honour`, where that had to wait.

        It waits for a transition, or the loading of a provider, to end, in this thread or in
        another, since that may be what imports torch; and for `sdpa` and the providers' packages
        to be imported, which a program may import before torch.
        """
        while self._resume_once():
            pass

    def _resume_once(self) -> bool:
        """Return whether it was in vain, but is worth another try."""
        await_first_call = self._await_first_call
        if not self.pending or await_first_call is None or self._awaits_first_call:
            return False
        if self._must_wait() or _is_half_imported_sdpa():
            return False
        if self._providers_are_half_imported():
            await_first_call("cpu", lambda: self._settle_on_cpu(await_first_call))
            await_first_call("cuda", self.settle)
            return False
        try:
            without_waiting(lambda: self._lock.hold(lambda: self._begin(await_first_call)))
        except BusyError as error:
            return error.is_over()
        except Exception as error:
            self.ask(())
            _raise_or_warn(error)
        return False

    def _begin(self, await_first_call: AwaitFirstCall) -> None:
        """Settle what needs no CUDA."""
        try:
            without_cuda(self._settle)
        except CudaNeededError:
            self._await_cuda(await_first_call)

    def _settle_on_cpu(self, await_first_call: AwaitFirstCall) -> bool:
        """As `settle`, at a call in a program that may not use CUDA."""
        try:
            return without_cuda(self.settle)
        except CudaNeededError:
            self._await_cuda(await_first_call)
            return True

    def _await_cuda(self, await_first_call: AwaitFirstCall) -> None:
        """Leave the rest to the first attention call on a GPU."""
        try:
            self._awaits_first_call = True  # before the call, which may import `sdpa`
            await_first_call("cuda", self.settle)
        except BaseException:
            self._awaits_first_call = False
            raise

    def settle(self) -> bool:
        """Activate what is pending, if anything is; the program uses CUDA now.

        If nothing can be activated there is a warning; in a strict environment the error, which the
        next call raises again. Another thread that comes meanwhile waits.

        Returns:
            Whether that is done. It is not in code that a transition runs, which cannot begin
            another, nor in a provider that is being imported.

        Raises:
            RequestUnavailableError: Nothing could be activated, in a strict environment.
        """
        if self._must_wait() or self._providers_are_half_imported():
            return False
        return self._lock.hold(self._settle_or_warn)

    def _settle_or_warn(self) -> bool:
        asked = self._asked
        try:
            if self._registry.current() is not None:
                self.supersede()  # it was activated in torch's registry, which tells nobody
            self._settle()
        except CudaNeededError:
            raise
        except Exception as error:
            # With its decision, so that one that another thread makes at any moment stands.
            _raise_or_warn(error, lambda: setattr(self, "_asked", asked))
        return not self.pending

    def _must_wait(self) -> bool:
        """Whether this is code that a transition runs, or a provider that is being loaded."""
        return self._registry.in_transition() or self._registry.is_loading()

    def _providers_are_half_imported(self) -> bool:
        """Whether the import of a provider's package has begun, and is not over."""
        return bool(self.pending) and _is_half_imported(self._registry.discovery.packages_seen())

    def _settle(self) -> None:
        """Activate the first of what is pending that can be; the lock is held.

        Not to be called inside a transition: who holds the lock may wait for that to end. Nothing
        happens in code that the settling itself runs.
        """
        if not self._settling:
            call_and_finish(self._settle_once, self._end_settling)

    def _settle_once(self) -> None:
        self._settling = True
        try:
            self._activate_first()
        except (CudaNeededError, BusyError):
            raise  # says nothing about the names; nor does an interrupt
        except Exception:
            self.ask(())
            raise
        self.ask(())

    def _end_settling(self) -> None:
        self._settling = False

    def _is_pending(self) -> bool:
        """Whether anything is: another thread may have decided otherwise since it was read."""
        return bool(self.pending)

    def _activate_first(self) -> None:
        reasons: dict[str, str] = {}
        failure: Exception | SystemExit | None = None
        for name in self.pending:
            try:
                if name == NATIVE:
                    self._registry.restore_if_active(wanted=self._is_pending)
                else:
                    self._registry.activate(name, wanted=self._is_pending)
            except (CudaNeededError, BusyError, RegistryWarning, RestoreError):
                raise  # the last two, a warning by a filter, come after the activation
            except (Exception, SystemExit) as error:  # an implementation must not end the program
                failure = error
                text = text_of(error) if isinstance(error, Exception) else describe(error)
                # An unknown name has notes, on providers that could not be loaded.
                reasons[name] = ". ".join([text, *getattr(error, "__notes__", ())])
            else:
                return
        if failure is not None and self._is_pending():
            listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
            raise RequestUnavailableError(
                f"{IMPL}={','.join(reasons)} asks for what cannot be activated here:{listed}",
                reasons,
            ) from failure


def _is_half_imported_sdpa() -> bool:
    """Whether the import of `sdpa` is what imports torch now; providers cannot use it yet."""
    sdpa = sys.modules.get("flash_attention_registry.sdpa")
    return sdpa is not None and not hasattr(sdpa, "__all__")


def _is_half_imported(packages: Container[str]) -> bool:
    """Whether a module in one of these top-level packages is being imported, in any thread."""
    return any(
        name.partition(".")[0] in packages
        and getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
    )


def _raise_or_warn(error: Exception, before_raising: Callable[[], object] = bool) -> None:
    """Raise `error` in a strict environment, else warn: an unmodified program goes on with stock.

    A warning that a filter made an error is no failure: what was asked for is active.

    Args:
        error: Is being handled.
        before_raising: Called if it is raised.
    """
    if isinstance(error, RegistryWarning):
        warn_or_log(text_of(error))
        return
    try:
        strict = environment.strict()
    except EnvironmentVariableError:
        strict = False
    if strict:
        before_raising()
        raise error
    text = text_of(error) if isinstance(error, RequestUnavailableError) else describe(error)
    warn_or_log(f"{text}\nTorch's own attention kernels run.")
