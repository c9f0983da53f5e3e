"""Which rank gets which GPU. Pure: the wishes of every rank in, a GPU for each and every complaint out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from epdctl.ids import RankName, Stage
from epdctl.topology.document import Trail
from epdctl.topology.hardware import Gpu
from epdctl.topology.schema import StageSection
from epdctl.topology.values import GpuName
from epdctl.topology.words import closest

__all__ = ["Complaint", "Seating", "Wish", "seat", "wishes_of"]

_FULL = 1 + 1e-9  # shares are written in decimals


@dataclass(frozen=True, slots=True)
class Complaint:
    """A wish that this machine cannot grant, before its trail has become a place."""

    trail: Trail
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What one rank asks for. ``gpu``: None for any that is free. ``trail``: where a named GPU stands in the file."""

    rank: RankName
    share: float | None
    trail: Trail
    gpu: GpuName | None = None


@dataclass(slots=True)
class Seating:
    """Who sits where so far."""

    seats: dict[RankName, Gpu] = field(default_factory=dict)
    complaints: list[Complaint] = field(default_factory=list)
    taken: defaultdict[str, list[Wish]] = field(default_factory=lambda: defaultdict(list))  # by the GPU's UUID

    def give(self, wish: Wish, gpu: Gpu) -> None:
        self.seats[wish.rank] = gpu
        self.taken[gpu.uuid].append(wish)

    def has_room(self, gpu: Gpu, share: float | None) -> bool:
        """Whether one more rank may sit there; a rank without a share wants the GPU for itself."""
        shares = [wish.share for wish in self.taken[gpu.uuid]]
        if not shares:
            return True
        used = sum(taken for taken in shares if taken is not None)
        return share is not None and None not in shares and used + share <= _FULL


def wishes_of(stage: Stage, section: StageSection) -> list[Wish]:
    """One wish per rank of a stage that runs on GPUs, in rank order."""
    ranks = [RankName.of(stage, index) for index in range(section.ranks)]
    trail: Trail = ("stages", stage.value, "gpus")
    named = section.gpus if isinstance(section.gpus, tuple) else ()
    if not named:
        return [Wish(rank, section.share, trail) for rank in ranks]
    wishes = []
    for index, rank in enumerate(ranks):
        position = index if len(named) > 1 else 0
        wishes.append(Wish(rank, section.share, (*trail, position), named[position]))
    return wishes


def seat(wishes: Sequence[Wish], gpus: Sequence[Gpu]) -> Seating:
    """Named GPUs first, whatever the order in the file; then the others, each on the first GPU with room for it."""
    seating = Seating()
    for wish in wishes:
        if wish.gpu is not None:
            _seat_named(seating, wish, wish.gpu, gpus)
    seating.complaints.extend(_double_bookings(seating, {gpu.uuid: gpu for gpu in gpus}))
    homeless: defaultdict[Trail, list[Wish]] = defaultdict(list)
    for wish in wishes:
        if wish.gpu is None:
            free = next((gpu for gpu in gpus if seating.has_room(gpu, wish.share)), None)
            if free is None:
                homeless[wish.trail].append(wish)
            else:
                seating.give(wish, free)
    seating.complaints.extend(_no_room(trail, left, wishes, gpus) for trail, left in homeless.items())
    return seating


def _seat_named(seating: Seating, wish: Wish, name: GpuName, gpus: Sequence[Gpu]) -> None:
    found = [gpu for gpu in gpus if (gpu.index == name if isinstance(name, int) else gpu.uuid.startswith(name))]
    if len(found) == 1 and not (isinstance(name, int) and found[0].mig_parent):
        seating.give(wish, found[0])
        return
    complaint = _ambiguous(wish, name, found) if found else _missing(wish, name, gpus)
    if complaint not in seating.complaints:  # several ranks of one stage may name the same GPU
        seating.complaints.append(complaint)


def _missing(wish: Wish, name: GpuName, gpus: Sequence[Gpu]) -> Complaint:
    if not gpus:
        return Complaint(wish.trail, f"GPU {name}: this machine shows no GPU", "write gpus: none, or see epdctl doctor")
    near = closest(name, [gpu.uuid for gpu in gpus]) if isinstance(name, str) else None
    there = ", ".join(map(str, gpus)) if isinstance(name, int) else ", ".join(gpu.uuid for gpu in gpus)
    return Complaint(
        wish.trail, f"there is no GPU {name}", f"did you mean {near}?" if near else f"visible are: {there}"
    )


def _ambiguous(wish: Wish, name: GpuName, found: Sequence[Gpu]) -> Complaint:
    names = ", ".join(gpu.uuid for gpu in found)
    if isinstance(name, int):
        return Complaint(wish.trail, f"GPU {name} is split into MIG slices", f"name a slice: {names}")
    return Complaint(wish.trail, f"{name} begins the UUID of several GPUs", f"write more of it: {names}")


def _double_bookings(seating: Seating, gpus: Mapping[str, Gpu]) -> list[Complaint]:
    complaints = []
    for uuid, wishes in seating.taken.items():
        if len(wishes) < 2:
            continue
        who = ", ".join(wish.rank for wish in wishes)
        total = sum(wish.share or 0 for wish in wishes)
        selfish = [wish for wish in wishes if wish.share is None]
        if selfish:
            problem = f"GPU {gpus[uuid]} is booked for {who}, but {_stages(selfish)} gives no share"
            remedy = "give each of these stages a share (together at most 1), or GPUs of their own"
            complaints.append(Complaint(wishes[-1].trail, problem, remedy))
        elif total > _FULL:
            problem = f"GPU {gpus[uuid]} is booked for {who}, whose shares add up to {total:g}"
            complaints.append(Complaint(wishes[-1].trail, problem, "lower the shares to at most 1 together"))
    return complaints


def _stages(wishes: Sequence[Wish]) -> str:
    return " and ".join(dict.fromkeys(wish.rank.stage.value for wish in wishes))


def _no_room(trail: Trail, left: Sequence[Wish], wishes: Sequence[Wish], gpus: Sequence[Gpu]) -> Complaint:
    if not gpus:
        remedy = "write gpus: none to run on the CPU, or see epdctl doctor"
        return Complaint(trail, f"{_stages(left)} wants a GPU, and this machine shows none", remedy)
    short = f"no GPU with room for {', '.join(wish.rank for wish in left)}"
    seen = f"{len(wishes)} ranks want one, {len(gpus)} {'is' if len(gpus) == 1 else 'are'} visible"
    return Complaint(trail, f"{short}: {seen}", "use fewer ranks, let them share with share, or write gpus: none")
