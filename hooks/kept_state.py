"""What a forward pass may leave behind in a module, noted before it and put back after.

Attributes are put back by reference, and what stands in them too: lists, dicts, sets and deques (and those inside
them) get their entries again, tensors and arrays their values and their place in memory, configs and plain objects of
the module's own file their attributes. The objects stay the same ones, for whoever holds them.

Not noted: containers of more than `_MOST_ENTRIES` entries (what stands inside them: of more than `_WALKED`), values of
tensors of more than `SMALL_STATE` elements, and objects of other files, whose insides are their library's own.
"""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .gradients.spread_weights import in_a_group
from .tensor_places import same_values, where_it_lies

# What torch keeps on every module; the mode is restored apart.
_OF_TORCH = frozenset(vars(nn.Module()))
_TABLES = [key for key, value in vars(nn.Module()).items() if isinstance(value, dict) and key != "_parameters"]
# Tensors of more elements are not copied each time; a model that writes into such a buffer is refused when wrapped.
SMALL_STATE = 1 << 20
# Elements of tensors that are no buffers, in all: a log of activations may hold more than the model.
_MOST_ELEMENTS = 1 << 24
# Entries of one container that are noted (a vocabulary has 150,000), that are looked into, and those of all of them.
_MOST_ENTRIES, _WALKED, _WALKED_IN_ALL = 1 << 18, 1 << 12, 1 << 16
_PLAIN = frozenset([bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, type])
Restore = Callable[[], None]


class KeptState:
    """The state of some modules; `restore()` puts it back."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._restore: list[Restore] = []
        self._seen: dict[int, object] = {}  # held, so that no other object takes an id
        self._elements, self._left, self._spread = 0, _WALKED_IN_ALL, in_a_group()
        self._to_note: list[tuple[Any, nn.Module, str]] = []  # a value, and the module and the attribute it is found at
        for module in modules:
            self._note_module(module)
            while self._to_note:
                self._note(*self._to_note.pop())

    def restore(self) -> None:
        """Put everything back; tensors and containers that were not changed are left alone.

        What cannot be put back raises as it does, once all else has been.
        """
        failed: list[Exception] = []
        with torch.no_grad():
            for restore in self._restore:
                try:
                    restore()
                except Exception as error:  # whatever a foreign container raises
                    failed.append(error)
        if failed:
            raise failed[0]

    def _note_module(self, module: nn.Module) -> None:
        attributes = {key: value for key, value in vars(module).items() if key not in _OF_TORCH}
        self._restore.append(lambda: _put_attributes_back(module, attributes))
        tables = [table for key in _TABLES if isinstance(table := vars(module).get(key), dict)]
        empty = [table for table in tables if not table]  # nearly all of them, so they cost one note together
        self._restore += [_entries_of(table) for table in tables if table]
        self._restore.append(lambda: _empty_again(empty))
        for buffer in module._buffers.values():
            if buffer is not None:
                self._note_tensor(buffer)
        parameters = vars(module).get("_parameters")
        # Weights that a library keeps elsewhere, or spreads over processes, come and go while the module runs.
        if isinstance(parameters, dict) and not self._spread and "_hf_hook" not in attributes:
            there = [p for p in parameters.values() if p is not None]
            if not any(p.is_meta for p in there):
                self._restore.append(_entries_of(parameters))
                for parameter in there:
                    self._note_tensor(parameter, values=False)
        self._look_into(attributes, module)

    def _look_into(self, attributes: Mapping[str, Any], module: nn.Module) -> None:
        self._to_note += [(held, module, key) for key, held in attributes.items() if type(held) not in _PLAIN]

    def _note(self, value: Any, module: nn.Module, key: str) -> None:
        if isinstance(value, nn.Module | nn.Parameter) or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._elements += min(value.numel(), SMALL_STATE)
            if value.numel() <= SMALL_STATE and self._elements <= _MOST_ELEMENTS:
                self._note_tensor(value)
            return
        self._seen[id(value)] = value
        if isinstance(value, np.ndarray):
            if value.size <= SMALL_STATE and value.dtype != object:
                self._restore.append(_array_of(value))
        elif isinstance(value, torch.Generator | np.random.Generator | random.Random):
            self._restore.append(_draws_of(value))
        elif isinstance(value, dict | list | set | deque | tuple):
            if len(value) <= _MOST_ENTRIES:
                self._note_container(value, module, key)
        elif _is_of_the_model(value, module, key):
            self._restore.append(_entries_of(vars(value)))
            self._look_into(vars(value), module)

    def _note_container(self, value: Any, module: nn.Module, key: str) -> None:
        if isinstance(value, dict):
            self._restore.append(_entries_of(value))
        elif isinstance(value, list | deque):
            self._restore.append(_items_of(value))
        elif isinstance(value, set):
            self._restore.append(_members_of(value))
        if len(value) <= _WALKED and not isinstance(value, set):
            inside = [*value.values()] if isinstance(value, dict) else [*value]
            inside = [held for held in inside if type(held) not in _PLAIN]
            if len(inside) <= self._left:  # what is plain costs nothing, and one that is too large takes from no other
                self._left -= len(inside)
                self._to_note += [(held, module, key) for held in inside]

    def _note_tensor(self, tensor: Tensor, *, values: bool = True) -> None:
        """Note where a tensor lies, and the values of a small one."""
        if id(tensor) in self._seen or tensor.is_meta or tensor.is_inference():
            return
        self._seen[id(tensor)] = tensor
        place, version = where_it_lies(tensor), tensor._version
        alias = tensor.detach() if place is not None else None
        kept = tensor.detach().clone() if values and tensor.numel() <= SMALL_STATE else None

        def restore() -> None:
            # Moved to another device it was by the caller.
            if alias is not None and tensor.device == alias.device and where_it_lies(tensor) != place:
                tensor.data = alias
            if kept is not None:
                same = same_values(tensor, kept)
                # Somebody may hold a graph that goes through it: it is written into only where it was changed.
                if same is False or (same is None and tensor._version != version):
                    tensor.copy_(kept)

        self._restore.append(restore)


def _put_attributes_back(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    state = vars(module)
    for key in [key for key in state if key not in _OF_TORCH and key not in attributes]:
        del state[key]
    state.update(attributes)


# By the methods of the plain kinds: those of a subclass may refuse (transformers' ModelOutput).


def _entries_of(table: dict[Any, Any]) -> Restore:
    kept, kind = dict(table), OrderedDict if isinstance(table, OrderedDict) else dict

    def restore() -> None:
        if not (_all_same(table, kept) and _all_same(table.values(), kept.values())):
            kind.clear(table)
            kind.update(table, kept)

    return restore


def _empty_again(tables: list[dict[Any, Any]]) -> None:
    for table in tables:
        if table:
            (OrderedDict if isinstance(table, OrderedDict) else dict).clear(table)


def _items_of(items: list[Any] | deque[Any]) -> Restore:
    kept = list(items)
    kind: Any = list if isinstance(items, list) else deque

    def restore() -> None:
        if not _all_same(items, kept):
            kind.clear(items)
            kind.extend(items, kept)

    return restore


def _members_of(members: set[Any]) -> Restore:
    kept = set(members)

    def restore() -> None:
        if len(members) != len(kept) or set(map(id, members)) != set(map(id, kept)):
            set.clear(members)
            set.update(members, kept)

    return restore


def _all_same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _array_of(array: np.ndarray[Any, Any]) -> Restore:
    kept = array.copy()

    def restore() -> None:
        if array.shape == kept.shape and array.tobytes() != kept.tobytes():
            array[...] = kept

    return restore


def _draws_of(generator: Any) -> Restore:
    """The state of a random generator that a module keeps for itself."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: _ignored(generator.set_state(state))
    if isinstance(generator, random.Random):
        kept = generator.getstate()
        return lambda: generator.setstate(kept)
    draws = generator.bit_generator.state
    return lambda: setattr(generator.bit_generator, "state", draws)


def _ignored(_: object) -> None: ...


def _is_of_the_model(value: Any, module: nn.Module, key: str) -> bool:
    """Whether an object is the model's own notebook: a config, a namespace, or of a class that its file defines."""
    if not hasattr(value, "__dict__") or isinstance(value, type):
        return False
    own_file = type(value).__module__ == type(module).__module__
    return key.endswith("config") or isinstance(value, SimpleNamespace) or own_file
