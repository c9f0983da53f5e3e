"""The YAML that people write, as pydantic models: strict types, no unknown keys, every field described.

What one field cannot know about another stands in ``checks``. ``epdctl schema`` prints ``json_schema()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from epdctl.ids import Stage
from epdctl.topology import names
from epdctl.topology.document import Document, Trail
from epdctl.topology.plan import Deadlines, RestartPolicy
from epdctl.topology.values import ApiKey, Bytes, CacheBytes, Gpus, Seconds
from epdctl.wire.config import EncoderConfig, EngineConfig, GatewayConfig, Limits, TransferConfig

__all__ = [
    "DeadlinesSection",
    "EncoderStage",
    "GatewaySection",
    "LanguageStage",
    "LimitsSection",
    "ModelSection",
    "MonoStage",
    "RestartSection",
    "StageSection",
    "Stages",
    "Topology",
    "TopologyFile",
    "TransferSection",
    "json_schema",
]

MEDIA_HOST = r"^[a-z0-9][a-z0-9.-]*(:[0-9]{1,5})?$"  # no wildcard: a host is named or it is not

_LIMITS, _ENGINE, _ENCODER = Limits(), EngineConfig(), EncoderConfig()
_GATEWAY, _TRANSFER = GatewayConfig(), TransferConfig()
_RESTART, _DEADLINES = RestartPolicy(), Deadlines()


class _Section(BaseModel):
    """A mapping of the file. ``key:`` with nothing behind it is left at its defaults where that makes sense."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which checkpoint, and the choices that change numbers."""

    path: str = Field(
        min_length=1,
        description="A local directory (seen from where epdctl is run), or a hub id that is in the local cache.",
    )
    name: str | None = Field(
        default=None, min_length=1, description="What the API calls it; default: path's last part."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on CPU, the checkpoint's own on GPU."
    )
    attention: Literal["auto", "sdpa", "varlen"] = Field(
        default="auto",
        description="Of the vision tower; varlen: packed, on GPUs, 16-bit. auto: varlen where it can be.",
    )
    residual: Literal["float32", "dtype"] = Field(
        default="float32",
        description="In 16 bits, what layers add to. float32: rounded less often than transformers does; "
        "dtype: in 16 bits too.",
    )
    image_processor: Literal["auto", "pil", "torchvision"] = Field(
        default="auto", description="They differ in pixels, so the plan pins one; auto: pil."
    )
    revision: str | None = Field(default=None, min_length=1, description="Of a hub id: a branch, tag or commit.")


class GatewaySection(_Section):
    """Where the OpenAI-compatible HTTP API listens."""

    host: str = Field(
        default=_GATEWAY.host,
        min_length=1,
        description="An address of this machine; wider than loopback needs api_key.",
    )
    port: int = Field(default=_GATEWAY.port, ge=1, le=65535, description="A free TCP port.")
    api_key: ApiKey | None = Field(
        default=None, description="What clients show as Authorization: Bearer; write ${EPDCTL_API_KEY}."
    )
    strict: bool = Field(default=False, description="A field of a request that nobody knows is a 400, not ignored.")
    media_hosts: list[Annotated[str, Field(pattern=MEDIA_HOST)]] = Field(
        default=[], description="Media may come from there over http(s): name or address, with :port if unusual."
    )
    media_timeout: Seconds = Field(default=_GATEWAY.media_seconds, description="For one such file, like 10s.")


class StageSection(_Section):
    """Ranks of one stage: replicas × dp processes, each with its own model."""

    replicas: int = Field(default=1, ge=1, le=1024, description="Copies of the stage.")
    dp: int = Field(default=1, ge=1, le=1024, description="Data-parallel ranks of each replica.")
    tp: int = Field(
        default=1, ge=1, le=64, description="Tensor-parallel shards of each rank; only 1 is served for now."
    )
    gpus: Gpus | None = Field(
        default=None,
        description="auto: free GPUs in order; none: CPU; or one GPU per rank, as indices (nvidia-smi's) or UUIDs; "
        "one GPU for all ranks needs share. Default: auto where there are GPUs, else none.",
    )
    share: float | None = Field(
        default=None, gt=0, le=1, description="The part of a GPU each rank takes, so that others may share it."
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of each rank.")

    @property
    def ranks(self) -> int:
        return self.replicas * self.dp


class EncoderStage(StageSection):
    """The tower: pictures, or sound, to embeddings."""

    batch_patches: int = Field(default=_ENCODER.batch_patches, ge=1, description="Patches of one forward.")
    preprocess_threads: int | None = Field(default=None, ge=1, le=256, description="Items prepared at once.")
    cache: CacheBytes = Field(
        default=_ENCODER.cache_bytes, description="Embeddings a rank remembers, like 512MiB; off: none."
    )
    prepared: Bytes = Field(
        default=_ENCODER.prepared_bytes,
        description="Media a rank holds prepared for its tower, like 1GiB; what does not fit waits.",
    )
    canary: Seconds = Field(
        default=_ENCODER.canary_seconds, description="How often an idle rank proves itself with a real encode."
    )
    canary_deadline: Seconds = Field(
        default=_ENCODER.canary_deadline, description="For that encode; beyond it the rank is unhealthy."
    )
    optimize: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: on GPUs and in 16 bits, towers of a known make run through kernels of our own; "
        "off: transformers' forward.",
    )


class EncoderHttpSection(_Section):
    """The encoder's own HTTP surface, for those who run it behind another engine."""

    host: str = Field(default="127.0.0.1", min_length=1, description="An address of this machine.")
    port: int = Field(ge=1, le=65535, description="A free TCP port.")
    token_file: str | None = Field(
        default=None, min_length=1, description="A file with the bearer token that clients show; not on loopback only."
    )
    strict: bool = Field(default=False, description="/health answers 503 when any one rank does not serve.")
    profiles: str | None = Field(default=None, min_length=1, description="Directory of what /start_profile records.")
    held: Bytes = Field(
        default=512 << 20, description="Embeddings of all its requests together, until readers have them."
    )


class RoutedEncoderStage(EncoderStage):
    """The vision tower in processes of its own, behind a router."""

    http: EncoderHttpSection | None = Field(default=None, description="POST /encode and /send, /health, /metrics.")


class LanguageStage(StageSection):
    """The language model: prefill, decode, or both in one process (language)."""

    kv_tokens: int | None = Field(
        default=None,
        ge=1,
        description=f"What the KV pool of a rank holds, in tokens. Default: on a GPU what its share leaves, else "
        f"{_ENGINE.kv_tokens}.",
    )
    page_size: int = Field(default=_ENGINE.page_size, ge=1, le=1024, description="Tokens in one KV page.")
    chunk_tokens: int = Field(default=_ENGINE.chunk_tokens, ge=1, description="Prompt tokens of one step.")
    max_batch: int = Field(default=_ENGINE.max_batch, ge=1, description="Sequences of one step.")


class MonoStage(LanguageStage, EncoderStage):
    """Vision tower and language model in one process."""


def _defaults_when_empty(value: object) -> object:
    return {} if value is None else value


_Encoder = Annotated[RoutedEncoderStage | None, BeforeValidator(_defaults_when_empty)]
_Language = Annotated[LanguageStage | None, BeforeValidator(_defaults_when_empty)]
_Mono = Annotated[MonoStage | None, BeforeValidator(_defaults_when_empty)]


class Stages(_Section):
    """encoder + prefill + decode, encoder + language, or mono. Without a vision tower the cluster answers text only."""

    encoder: _Encoder = Field(default=None, description="Pictures to embeddings.")
    prefill: _Language = Field(default=None, description="The prompt to a KV cache and a first token; needs decode.")
    decode: _Language = Field(default=None, description="One token at a time; needs prefill.")
    language: _Language = Field(default=None, description="Prefill and decode in one process, without a handoff.")
    mono: _Mono = Field(default=None, description="All of them in one process; stands alone.")

    def present(self) -> Iterator[tuple[Stage, StageSection]]:
        """The stages written down, in the order of a request."""
        for stage in (Stage.ENCODER, Stage.PREFILL, Stage.DECODE, Stage.LANGUAGE, Stage.MONO):
            section: StageSection | None = getattr(self, stage.value)
            if section is not None:
                yield stage, section

    @property
    def fronted(self) -> bool:
        """There is a gateway: an encoder by itself has its readers elsewhere."""
        return [stage for stage, _ in self.present()] != [Stage.ENCODER]


class LimitsSection(_Section):
    """Bounds on what one request and one rank may take."""

    inflight: int = Field(default=_LIMITS.inflight, ge=1, description="Items or sequences a rank works on at once.")
    queue: int = Field(default=_LIMITS.queue, ge=0, description="Waiting beyond that; full is answered with 429.")
    max_pixels: int = Field(
        default=_LIMITS.max_pixels, ge=1, description="Of a picture or frame, read from its header."
    )
    max_clip_seconds: Seconds = Field(
        default=_LIMITS.max_clip_seconds, description="Of one sound clip or video, read from its header, like 10m."
    )
    max_media: int = Field(
        default=_LIMITS.max_media, ge=0, description="Pictures, sound clips and videos of one request."
    )
    max_body_bytes: Bytes = Field(default=_LIMITS.max_body_bytes, description="One HTTP body, like 64MiB.")
    max_context: int = Field(default=_LIMITS.max_context, ge=2, description="Prompt and answer together, in tokens.")
    media_bytes: Bytes = Field(
        default=_LIMITS.media_bytes, description="Media the gateway keeps until their requests end, like 512MiB."
    )
    request_seconds: Seconds = Field(default=_LIMITS.request_seconds, description="A request's deadline, like 5m.")
    wait_seconds: Seconds = Field(
        default=_LIMITS.wait_seconds, description="How long a request waits while no rank can take it; then 503."
    )


class TransferSection(_Section):
    """How embeddings and KV pages move between ranks."""

    backend: Literal["auto", "zmq", "shm", "cuda-ipc", "mooncake"] = Field(
        default="auto",
        description="shm: within a host, on CPUs; cuda-ipc: within a host, between GPUs; mooncake: by its engine, over "
        "NVLink, RDMA or TCP; zmq: anywhere. "
        "auto: the best that all ranks can do; `plan` says which.",
    )
    protocol: Literal["tcp", "rdma", "nvlink"] | None = Field(
        default=None, description="Of mooncake; proved by a timed write at start. Default: nvlink on GPUs, else tcp."
    )
    checksum: bool = Field(
        default=_TRANSFER.checksum, description="Verify every write by a CRC-32; costs about 1 s for each GB."
    )
    embedding_pool: Bytes = Field(
        default=_TRANSFER.embedding_bytes,
        description="Memory of each prefill, language or mono rank for embeddings; by default more where one picture "
        "needs it.",
    )


class RestartSection(_Section):
    """Exponential back-off with jitter, under a budget over a sliding window."""

    mode: Literal["always", "on-failure", "never"] = Field(
        default=_RESTART.mode.value, description="on-failure: an exit with status 0 leaves the rank stopped."
    )
    initial: Seconds = Field(default=_RESTART.initial, description="The first delay.")
    maximum: Seconds = Field(default=_RESTART.maximum, description="The longest delay.")
    jitter: float = Field(default=_RESTART.jitter, ge=0, lt=1, description="The delay varies by this part of itself.")
    budget: int = Field(default=_RESTART.budget, ge=0, description="Restarts within the window; one more is FAILED.")
    window: Seconds = Field(default=_RESTART.window, description="Over which restarts are counted.")
    stable: Seconds = Field(default=_RESTART.stable, description="Ready this long forgives every earlier restart.")


class DeadlinesSection(_Section):
    """How long the supervisor waits for each thing."""

    start: Seconds = Field(default=_DEADLINES.start, description="From spawn to ready.")
    heartbeat: Seconds = Field(default=_DEADLINES.heartbeat, description="Between two heartbeats.")
    unhealthy: Seconds = Field(default=_DEADLINES.unhealthy, description="Without a heartbeat: no longer routed to.")
    dead: Seconds = Field(default=_DEADLINES.dead, description="Without a heartbeat: killed and restarted.")
    stuck: Seconds = Field(
        default=_DEADLINES.stuck,
        description="One forward that does not end, or unhealthy without recovery: killed and restarted. "
        "Default: more on a CPU where one step of the model may take longer.",
    )
    drain: Seconds = Field(default=_DEADLINES.drain, description="For requests in flight when a rank is to leave.")
    kill: Seconds = Field(default=_DEADLINES.kill, description="From SIGTERM to SIGKILL.")


class TopologyFile(_Section):
    """One cluster: a model, and the stages that serve it."""

    schema_version: Literal[1] = Field(default=1, alias="schema", description="Version of this format.")
    cluster: str | None = Field(
        default=None,
        pattern=names.PATTERN,
        description="The cluster's name: up to 32 of a-z, 0-9, - and _. Default: from the file's name.",
    )
    model: ModelSection
    gateway: GatewaySection = GatewaySection()
    stages: Stages = Stages()
    limits: LimitsSection = LimitsSection()
    transfer: TransferSection = TransferSection()
    restart: RestartSection = RestartSection()
    deadlines: DeadlinesSection = DeadlinesSection()
    adapter: Literal["native"] = Field(default="native", description="What runs in the ranks.")


@dataclass(frozen=True, slots=True)
class Topology:
    """One cluster as it was written. ``document`` tells later passes where a field stands.

    ``doubtful``: fields with a mistake, while all mistakes are gathered; a topology that is run has none.
    """

    cluster: str
    file: TopologyFile
    document: Document
    doubtful: frozenset[Trail] = frozenset()

    @property
    def source(self) -> str:
        return self.document.file

    def doubts(self, *trails: Trail) -> bool:
        """Whether a mistake lies at, above or below one of ``trails``."""
        return any(one[: len(two)] == two or two[: len(one)] == one for one in trails for two in self.doubtful)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a topology file; every scalar may also be a ``${…}`` reference."""
    schema = TopologyFile.model_json_schema(by_alias=True)
    for section in (schema, *schema["$defs"].values()):
        if "properties" in section:
            section["properties"] = {name: _or_reference(value) for name, value in section["properties"].items()}
    schema["patternProperties"] = {"^x-": {"description": "Yours: a place for YAML anchors."}}
    schema["$defs"]["Reference"] = {
        "type": "string",
        "pattern": r"\$\{",
        "description": "${VAR}, ${VAR:-default} or ${VAR:?message}",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "epdctl topology"}


def _or_reference(field: Mapping[str, Any]) -> dict[str, Any]:
    """The field's schema, open to a reference; sections and free text stay as they are."""
    if field.get("$ref") or (field.get("type") == "string" and not {"enum", "const", "pattern"} & field.keys()):
        return dict(field)
    kept = {key: field[key] for key in ("title", "description", "default") if key in field}
    value = {key: field[key] for key in field if key not in kept}
    if any("$ref" in option for option in value.get("anyOf", ())):
        return dict(field)
    return kept | {"anyOf": [*value.pop("anyOf", ()), *([value] if value else ()), {"$ref": "#/$defs/Reference"}]}
