"""Reads the collectives of a compiled program from its HLO text.

`compiled.as_text()` holds one device's program; each instruction stands once, however often a loop
runs it, so the body of a scan over K steps gives the communication of one step. Works for CPU, GPU
and TPU programs, also for those compiled for chips that are not there.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# "%name = TYPE kind(": a type may have parentheses of its own, in tuples and in TPU tilings.
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<kind>{'|'.join(KINDS)})"
    r"(?P<part>-start|-done)?\((?P<rest>.*)"
)
# A computation's first line, and one that runs another computation beside the rest.
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r" async-start\(.*\bcalls=%?([\w.-]+)")
# A TPU splits a collective over several fusions, between which other work is done, and repeats it
# in each of them with one number.
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+(?:e\d+m\d+[a-z]*)?)\[([0-9,<=]*)\]")
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")


@dataclass(frozen=True)
class Collective:
    """One collective instruction, as one device sees it.

    Attributes:
      kind: one of `KINDS`; a start and its done are one instruction.
      name: of the instruction (of the start).
      shapes: its results as (element type, dimensions).
      bytes: of all results.
      group: how many devices take part; 0 where the text does not say.
      asynchronous: whether it is made of a start and an end, with other work between them.
    """

    kind: str
    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    group: int
    asynchronous: bool

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends if the collective runs as a ring of `group` devices."""
        n = max(self.group, 1)
        if self.kind == "all-reduce":  # a reduce-scatter and an all-gather
            return 2 * self.bytes * (n - 1) / n
        if self.kind == "reduce-scatter":  # the result is a part of what is reduced
            return float(self.bytes * (n - 1))
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return self.bytes * (n - 1) / n


def shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The arrays in a type: "(f32[8,3]{1,0}, s32[])" -> (("f32", (8, 3)), ("s32", ())).

    A dimension that is only bounded ("<=16") counts with its bound; tokens are left out.
    """
    found = _SHAPE.findall(text)
    return tuple(
        (kind, tuple(int(n.removeprefix("<=")) for n in sizes.split(",") if n))
        for kind, sizes in found
    )


def size(kind: str, dimensions: tuple[int, ...]) -> int:
    """Bytes of an array; types of less than a byte are packed."""
    digits = re.search(r"\d+", kind)
    bits = int(digits.group()) if digits else 8  # pred
    return -(-math.prod(dimensions) * bits // 8)


def collectives(text: str) -> list[Collective]:
    """The collectives of an HLO module's text, in its order.

    Raises:
      ValueError: a done without its start, or a start without its done: the text is cut off.
    """
    head = text[: text.find("\n")]
    everyone = math.prod(int(n) for n in _DEVICES.findall(head)) if "HloModule" in head else 0
    beside = set(_CALLED.findall(text))
    chains: set[tuple[str, str]] = set()
    started: dict[str, tuple[int, re.Match[str]]] = {}
    result: list[Collective | None] = []
    computation = ""
    for line in text.splitlines():
        if head_line := _COMPUTATION.match(line):
            computation = head_line[1]
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        chain = _CHAIN.search(line)
        if chain is not None:
            if (match["kind"], chain[1]) in chains:
                continue
            chains.add((match["kind"], chain[1]))
        apart = chain is not None or computation in beside
        if match["part"] == "-start":
            # Its own type has the operands and a context besides the results: the done's has not.
            started[match["name"]] = len(result), match
            result.append(None)
        elif match["part"] == "-done":
            names = [n for n in re.findall(r"[\w.-]+", match["rest"]) if n in started]
            if not names:
                raise ValueError(f"{match['name']} has no start")
            place, start = started.pop(names[0])
            result[place] = _make(start, match["type"], everyone, True)
        else:
            result.append(_make(match, match["type"], everyone, apart))
    if started:
        raise ValueError(f"{', '.join(started)} has no done")
    return [each for each in result if each is not None]


def summary(found: Iterable[Collective]) -> dict[str, dict[str, Any]]:
    """Count, bytes, bytes sent by each device (ring) and asynchronous ones, by kind."""
    result: dict[str, dict[str, Any]] = {}
    for each in found:
        row = result.setdefault(
            each.kind, {"count": 0, "bytes": 0, "sent_bytes": 0.0, "asynchronous": 0}
        )
        row["count"] += 1
        row["bytes"] += each.bytes
        row["sent_bytes"] += each.sent_bytes
        row["asynchronous"] += each.asynchronous
    return result


def _make(match: re.Match[str], results: str, everyone: int, apart: bool) -> Collective:
    found = shapes(results)
    return Collective(
        kind=match["kind"],
        name=match["name"],
        shapes=found,
        bytes=sum(size(*shape) for shape in found),
        group=_group(match["rest"], everyone),
        asynchronous=apart,
    )


def _group(attributes: str, everyone: int) -> int:
    """Devices in a group: "{{0,1},{2,3}}", "[2,2]<=[4]", "{}" for all; pairs of a permute: all."""
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes):
        return len(listed.group(1).split(","))
    # "[groups, size]<=[...]": the devices in order, cut into groups.
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(counted.group(1))
    return everyone
