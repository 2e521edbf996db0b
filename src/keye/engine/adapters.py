"""The adapters of one loaded model by name. Their bytes are reserved in the ledger as long as a request uses them, also
when they were unloaded meanwhile."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from keye.cache.ledger import Ledger
from keye.errors import KeyeError, closest
from keye.models.adapter_files import read_adapter
from keye.models.adapters import Adapter
from keye.models.keye import KeyeModel

#: The ledger's account.
ACCOUNT: Final = "adapters"
_NAME: Final = re.compile(r"[\w.:/@+-]{1,200}")


def check_name(name: object) -> None:
    """`KeyeError` for what cannot be the name of an adapter, or no part of the address /v1/models/NAME."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not all(part.strip(".") for part in name.split("/")):
        raise KeyeError(f"{str(name)[:100]!r} is not a name for an adapter: use letters, digits and . _ - / : @ +")


class Adapters:
    """Loads, finds and unloads adapters; `get` may be called from any thread."""

    def __init__(self, model: KeyeModel, ledger: Ledger) -> None:
        self._model, self._ledger = model, ledger
        self._by_name: dict[str, Adapter] = {}
        self._loading = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what is loaded, in the order of loading."""
        return tuple(self._by_name)

    def load(
        self, path: str | Path, name: str, exclusive: Callable[[], AbstractContextManager[None]], *,
        replace: bool = False,
    ) -> Adapter:  # fmt: skip
        """Reads the adapter in the folder `path`; it is attached to the model under `exclusive`. With `replace` it
        takes the place of one that is called so. `KeyeError` for a name that is taken, an adapter that does not fit
        the model, and one that memory does not hold."""
        check_name(name)
        with self._loading:
            default = self._model.adapter_rows.default
            if name in self._by_name and (not replace or self._by_name[name] is default):
                raise KeyeError(f"an adapter {name!r} is loaded already: unload it first, or choose another name")
            reserved = 0

            def reserve(nbytes: int) -> None:
                nonlocal reserved
                self._ledger.reserve(ACCOUNT, nbytes)
                reserved = nbytes

            model = self._model
            try:
                adapter = read_adapter(
                    Path(path).expanduser(), name, model, dtype=model.dtype, device=model.device, reserve=reserve
                )
            except BaseException:
                self._ledger.release(ACCOUNT, reserved)
                raise
            weakref.finalize(adapter, self._ledger.release, ACCOUNT, adapter.nbytes)
            with exclusive():
                model.adapter_rows.attach(model, adapter)
            self._by_name[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Forgets an adapter; requests that use it go on with it. `KeyeError` for the default."""
        if self.get(name) is self._model.adapter_rows.default:
            raise KeyeError(f"the adapter {name!r} is the default of all requests: load the model without it")
        self._by_name.pop(name, None)

    def get(self, name: str) -> Adapter:
        """The adapter of a name; `KeyeError` for one that is not loaded."""
        adapter = self._by_name.get(name) if isinstance(name, str) else None
        if adapter is None:
            near, known = closest(str(name), self._by_name), ", ".join(self._by_name) or "none"
            hint = f"did you mean {near}?" if near else f"loaded: {known}"
            raise KeyeError(f"no adapter {str(name)[:100]!r} is loaded; {hint}")
        return adapter
