"""What has to hold between the fields of a topology. Each check is one function of the file; CHECKS is the list.

Nothing here looks at the machine: that is placement.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from epdctl.topology.document import Trail
from epdctl.topology.schema import LanguageStage, StageSection, TopologyFile

__all__ = ["CHECKS", "Finding", "check"]

MAX_RANKS = 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake before its trail has become a place. ``also``: other fields that led to it."""

    trail: Trail
    problem: str
    remedy: str
    also: tuple[Trail, ...] = ()

    def rests_on(self, trails: Collection[Trail]) -> bool:
        """Whether one of the fields behind this finding is, or lies above, one of ``trails``."""
        behind = (self.trail, *self.also) if len(self.trail) > 2 or self.trail[0] != "stages" else self.also
        return any(trail[: len(field)] == field for field in behind for trail in trails)


Check = Callable[[TopologyFile], Iterator[Finding]]


def check(file: TopologyFile) -> list[Finding]:
    return [finding for one in CHECKS for finding in one(file)]


def something_is_served(file: TopologyFile) -> Iterator[Finding]:
    if not any(file.stages.present()):
        remedy = "add encoder, prefill and decode; or encoder and language; or mono"
        yield Finding(("stages",), "no stage is there", remedy, (("stages",),))


def prefill_and_decode_come_together(file: TopologyFile) -> Iterator[Finding]:
    stages = file.stages
    if stages.decode and not stages.prefill:
        yield Finding(("stages", "decode"), "decode without prefill: nobody computes prompts", "add prefill: {}")
    if stages.prefill and not stages.decode and not stages.language:
        yield Finding(("stages", "prefill"), "prefill without decode: nobody takes its KV cache over", "add decode: {}")


def language_stands_alone(file: TopologyFile) -> Iterator[Finding]:
    stages = file.stages
    if stages.language and (stages.prefill or stages.decode):
        problem = "language beside prefill or decode: language is both, in one process"
        yield Finding(("stages", "language"), problem, "keep language, or prefill and decode")


def encoder_has_a_reader(file: TopologyFile) -> Iterator[Finding]:
    stages = file.stages
    if not stages.encoder or stages.encoder.http:
        return
    if not (stages.prefill or stages.decode or stages.language or stages.mono):
        problem = "encoder alone: nobody reads its embeddings"
        remedy = "add prefill and decode, or language; or http, for a reader of your own"
        yield Finding(("stages", "encoder"), problem, remedy)


def encoder_http_is_guarded(file: TopologyFile) -> Iterator[Finding]:
    http = file.stages.encoder.http if file.stages.encoder else None
    if http is None:
        return
    place: Trail = ("stages", "encoder", "http")
    try:
        address = ipaddress.IPv4Address("127.0.0.1" if http.host == "localhost" else http.host)
    except ValueError:
        yield Finding((*place, "host"), f"{http.host!r} is not an IPv4 address", "write an address of this machine")
        return
    if address.is_unspecified:
        remedy = "write the one address that clients reach it at"
        yield Finding((*place, "host"), f"{http.host} would listen on every address, for everybody", remedy)
    elif not address.is_loopback and http.token_file is None:
        problem = f"{http.host} is reachable from other machines, and no token is asked for"
        yield Finding((*place, "host"), problem, "add token_file, or write 127.0.0.1", ((*place, "token_file"),))
    if file.stages.fronted and (http.host, http.port) == (file.gateway.host, file.gateway.port):
        also: tuple[Trail, ...] = (("gateway", "port"),)
        yield Finding((*place, "port"), f"port {http.port} is the gateway's too", "write another port", also)


def mono_stands_alone(file: TopologyFile) -> Iterator[Finding]:
    others = [name for name, _ in _stages(file) if name != "mono"]
    if file.stages.mono and others:
        problem = f"mono beside {' and '.join(others)}: mono is every stage, in one process"
        yield Finding(("stages", "mono"), problem, "keep mono, or the other stages")


def mono_moves_nothing(file: TopologyFile) -> Iterator[Finding]:
    backend = file.transfer.backend
    if file.stages.mono and backend != "auto":
        problem = f"transfer over {backend}, but a mono rank keeps its embeddings in its own memory"
        yield Finding(("transfer", "backend"), problem, "write auto, or remove it", (("stages", "mono"),))


def tensor_parallel_is_not_served(file: TopologyFile) -> Iterator[Finding]:
    for name, stage in _stages(file):
        if stage.tp > 1:
            problem = f"tensor parallelism is not served yet, found tp: {stage.tp}"
            yield Finding(("stages", name, "tp"), problem, "write tp: 1; replicas or dp add ranks")


def gpu_list_matches_ranks(file: TopologyFile) -> Iterator[Finding]:
    for name, stage in _stages(file):
        if not isinstance(stage.gpus, tuple) or len(stage.gpus) == stage.ranks:
            continue
        trail: Trail = ("stages", name, "gpus")
        also: tuple[Trail, ...] = tuple(("stages", name, field) for field in ("replicas", "dp", "share"))
        listed, wanted = len(stage.gpus), stage.ranks
        if listed > 1:
            problem = f"{_counted(listed, 'GPU')} for {_counted(wanted, 'rank')} (replicas × dp)"
            yield Finding(trail, problem, f"list {_counted(wanted, 'GPU')}, or one that all share", also)
        elif stage.share is None:
            problem = f"one GPU for {_counted(wanted, 'rank')}, which do not share"
            yield Finding(trail, problem, f"list {wanted} GPUs, or add share: {_even(wanted)}", also)
        elif stage.share * wanted > 1 + 1e-9:
            problem = f"{wanted} ranks with share {stage.share:g} need {stage.share * wanted:g} of one GPU"
            yield Finding(("stages", name, "share"), problem, f"write share: {_even(wanted)} or less", also)


def a_machine_can_hold_it(file: TopologyFile) -> Iterator[Finding]:
    ranks = sum(stage.ranks for _, stage in _stages(file))
    if ranks > MAX_RANKS:
        problem = f"{ranks} ranks; one machine is given at most {MAX_RANKS}"
        yield Finding(("stages",), problem, "write fewer replicas or dp")


def gpu_is_listed_once(file: TopologyFile) -> Iterator[Finding]:
    for name, stage in _stages(file):
        if isinstance(stage.gpus, tuple) and stage.share is None:
            for gpu, times in Counter(stage.gpus).items():
                if times > 1:
                    problem = f"GPU {gpu} is listed {times} times without share"
                    also: tuple[Trail, ...] = (("stages", name, "share"),)
                    yield Finding(("stages", name, "gpus"), problem, "list each once, or add share", also)


def share_needs_a_gpu(file: TopologyFile) -> Iterator[Finding]:
    for name, stage in _stages(file):
        if stage.share is not None and stage.gpus == "none":
            yield Finding(("stages", name, "share"), "share of a GPU, but gpus is none", "remove share, or name a GPU")


def page_sizes_agree(file: TopologyFile) -> Iterator[Finding]:
    prefill, decode = file.stages.prefill, file.stages.decode
    if prefill and decode and prefill.page_size != decode.page_size:
        problem = f"pages of {decode.page_size} tokens, but prefill writes pages of {prefill.page_size}"
        also: tuple[Trail, ...] = (("stages", "prefill", "page_size"),)
        yield Finding(("stages", "decode", "page_size"), problem, "give both the same page_size", also)


def pool_holds_a_page(file: TopologyFile) -> Iterator[Finding]:
    for name, stage in _stages(file):
        if isinstance(stage, LanguageStage) and stage.kv_tokens is not None and stage.kv_tokens < stage.page_size:
            problem = f"a pool of {stage.kv_tokens} tokens is less than one page of {stage.page_size}"
            also: tuple[Trail, ...] = (("stages", name, "page_size"),)
            yield Finding(("stages", name, "kv_tokens"), problem, "raise kv_tokens", also)


def pool_holds_a_request(file: TopologyFile) -> Iterator[Finding]:
    """Only where max_context was written: the default gives way to the pool, with a note in the plan."""
    if "max_context" not in file.limits.model_fields_set:
        return
    for name, stage in _stages(file):
        if not isinstance(stage, LanguageStage) or stage.kv_tokens is None:
            continue
        context, page = file.limits.max_context, stage.page_size
        held = stage.kv_tokens // page * page
        if held < context:
            problem = f"a pool of {held} tokens (whole pages of {page}) never holds a request of max_context {context}"
            remedy = f"write kv_tokens: {-(-context // page) * page} or more, or lower limits.max_context"
            yield Finding(("stages", name, "kv_tokens"), problem, remedy)


def gateway_is_guarded(file: TopologyFile) -> Iterator[Finding]:
    host = file.gateway.host
    if host == "localhost":
        return
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        remedy = "write 127.0.0.1, or the one address that clients reach it at"
        yield Finding(("gateway", "host"), f"{host!r} is not an IPv4 address", remedy)
        return
    if address.is_unspecified:
        remedy = "write 127.0.0.1, or the one address that clients reach it at"
        yield Finding(("gateway", "host"), f"{host} would listen on every address, for everybody", remedy)
    elif not address.is_loopback and file.gateway.api_key is None:
        problem = f"{host} is reachable from other machines, and the API asks no key"
        remedy = "add api_key: ${EPDCTL_API_KEY}, or write 127.0.0.1 and reach it through an SSH tunnel"
        yield Finding(("gateway", "host"), problem, remedy, (("gateway", "api_key"),))


def deadlines_are_in_order(file: TopologyFile) -> Iterator[Finding]:
    deadlines = file.deadlines
    if deadlines.unhealthy <= deadlines.heartbeat:
        problem = f"unhealthy after {deadlines.unhealthy:g} s, but a heartbeat comes every {deadlines.heartbeat:g} s"
        yield Finding(("deadlines", "unhealthy"), problem, "allow several heartbeats", (("deadlines", "heartbeat"),))
    if deadlines.dead <= deadlines.unhealthy:
        problem = f"dead after {deadlines.dead:g} s, which is not later than unhealthy ({deadlines.unhealthy:g} s)"
        yield Finding(("deadlines", "dead"), problem, "write dead above unhealthy", (("deadlines", "unhealthy"),))
    if deadlines.stuck <= deadlines.unhealthy:
        problem = f"stuck after {deadlines.stuck:g} s, which is not later than unhealthy ({deadlines.unhealthy:g} s)"
        yield Finding(("deadlines", "stuck"), problem, "write stuck above unhealthy", (("deadlines", "unhealthy"),))


def restart_delays_are_in_order(file: TopologyFile) -> Iterator[Finding]:
    restart = file.restart
    if restart.maximum < restart.initial:
        problem = f"the longest delay, {restart.maximum:g} s, is shorter than the first, {restart.initial:g} s"
        remedy = "write maximum at or above initial"
        yield Finding(("restart", "maximum"), problem, remedy, (("restart", "initial"),))


def revision_needs_a_hub_id(file: TopologyFile) -> Iterator[Finding]:
    if file.model.revision is not None and file.model.path.startswith(("/", ".", "~")):
        problem = f"revision {file.model.revision!r} of a local directory"
        yield Finding(("model", "revision"), problem, "remove it, or give a hub id as model.path")


CHECKS: tuple[Check, ...] = (
    something_is_served,
    prefill_and_decode_come_together,
    language_stands_alone,
    encoder_has_a_reader,
    encoder_http_is_guarded,
    mono_stands_alone,
    mono_moves_nothing,
    tensor_parallel_is_not_served,
    a_machine_can_hold_it,
    gpu_list_matches_ranks,
    gpu_is_listed_once,
    share_needs_a_gpu,
    page_sizes_agree,
    pool_holds_a_page,
    pool_holds_a_request,
    gateway_is_guarded,
    deadlines_are_in_order,
    restart_delays_are_in_order,
    revision_needs_a_hub_id,
)


def _stages(file: TopologyFile) -> Iterator[tuple[str, StageSection]]:
    for stage, section in file.stages.present():
        yield stage.value, section


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _even(ranks: int) -> str:
    """The largest share, in two digits, that ``ranks`` ranks can have."""
    return f"{int(100 / ranks) / 100:g}" if ranks <= 100 else f"{1 / ranks:.4g}"
