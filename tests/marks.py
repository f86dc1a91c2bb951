"""Marks that follow from what a test is: whether it uses another library or starts processes, and which cells
cover its matrix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from tests.peers import Peer

PEERS = {
    "cleanfid", "diffusers", "open_clip", "peft", "prdc", "pytorch_fid", "scipy", "sentencepiece", "timm",
    "torch_fidelity", "torchmetrics",
    "transformers",
}  # fmt: skip
STARTERS = {
    "multiprocessing",
    "subprocess",
}  # torch.multiprocessing is imported by the programs, and not by their tests


def mark(items: list[pytest.Item]) -> None:
    """Adds `peer`, `process` and `matrix`."""
    matrices: dict[tuple[str, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        origins = {origin(thing) for thing in things_used(item)}
        if origins & PEERS or "tests.peers" in origins:
            item.add_marker("peer")
        if origins & STARTERS or "tests.forking" in origins:
            item.add_marker("process")
        if hasattr(item, "callspec"):
            matrices[str(item.path), item.originalname].append(item)
    for cells in matrices.values():
        covering = set(
            cover([{(name, id(value)) for name, value in item.callspec.params.items()} for item in cells])
        )
        for i in set(range(len(cells))) - covering:
            cells[i].add_marker("matrix")


def cover(cells: list[set[tuple[str, int]]]) -> Iterator[int]:
    """Some cells in which every value of every parameter occurs: first those of which all values are new,
    then those with any new one."""
    seen = set[tuple[str, int]]()
    for enough in (all, any):
        for i, values in enumerate(cells):
            if enough(value not in seen for value in values):
                seen.update(values)
                yield i


def things_used(item: pytest.Function) -> Iterator[Any]:
    """The modules, classes and functions that a test, its fixtures and its parameters name, also through
    other code of the tests."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    fixtures = (
        fixture.func
        for name in item.fixturenames
        for fixture in item._fixtureinfo.name2fixturedefs.get(name, ())
    )
    waiting, seen = [item.function, *fixtures, *parameters], set[int]()
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or not isinstance(thing, FunctionType | type | ModuleType | Peer):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, FunctionType) and thing.__module__.startswith("tests."):
            waiting += named(thing)
        elif isinstance(thing, type) and thing.__module__.startswith("tests."):
            waiting += vars(thing).values()


def named(function: FunctionType) -> Iterator[Any]:
    """What the names in a function stand for, in its module and in the modules of the tests that it names."""
    names = set(names_in(function.__code__))
    modules = [thing for name in names if isinstance(thing := function.__globals__.get(name), ModuleType)]
    for space in [
        function.__globals__,
        *(vars(module) for module in modules if origin(module).startswith("tests.")),
    ]:
        yield from (space[name] for name in names & space.keys())


def names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def origin(thing: Any) -> str:
    """The package that something comes from, or the module of the tests."""
    name = (
        thing._name
        if isinstance(thing, Peer)
        else thing.__name__
        if isinstance(thing, ModuleType)
        else thing.__module__
    )
    return name if name.startswith("tests.") else name.split(".")[0]
