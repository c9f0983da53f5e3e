"""What one rank is told at start. The plan is made of these, so that nothing is typed out twice."""

from __future__ import annotations

import msgspec

from epdctl.ids import Incarnation, LocalGpu, RankName, RunId, Secret, Stage
from epdctl.wire.message import Message, Part

__all__ = [
    "EncoderConfig",
    "EncoderHttp",
    "EngineConfig",
    "GatewayConfig",
    "Limits",
    "ModelConfig",
    "RankConfig",
    "RankSpec",
    "TransferConfig",
]


class ModelConfig(Part, frozen=True):
    """Which checkpoint, and the choices that change numbers."""

    path: str  # local directory
    name: str  # what the API calls it
    family: str  # "qwen2_5_vl", …: the module names in families/ and engine/families/
    dtype: str = "float32"  # float32 | bfloat16 | float16
    attention: str = "auto"
    image_processor: str = "pil"  # pil | torchvision: they differ in pixels, so the plan pins one
    residual: str = "float32"  # float32 | dtype: in 16 bits, what layers add to
    optimize: str = "auto"  # auto | off: the vision tower through our own kernels, where they fit it
    revision: str | None = None


class Limits(Part, frozen=True):
    """Bounds on what one request and one rank may take."""

    inflight: int = 64  # items or sequences a rank works on at once
    queue: int = 256  # waiting beyond those in flight, before each rank and before all of them; full is 429
    max_pixels: int = 16_777_216  # of one picture or frame, from its header
    max_media: int = 16  # pictures, clips, … of one request
    max_clip_seconds: float = 600.0  # of one sound clip or video, from its header
    max_body_bytes: int = 64 << 20
    max_context: int = 32_768  # prompt + answer, tokens
    media_bytes: int = 512 << 20  # media the gateway keeps until their requests end
    request_seconds: float = 300.0  # a request's deadline
    wait_seconds: float = 30.0  # while no rank can take it


class EngineConfig(Part, frozen=True):
    """The native engine's shapes."""

    page_size: int = 16  # tokens in a KV page
    kv_tokens: int = 65_536  # what the KV pool holds, in tokens
    chunk_tokens: int = 512  # prompt tokens of one step
    max_batch: int = 64  # sequences of one step


class EncoderHttp(Part, frozen=True):
    """The encoder's own HTTP surface, on its router."""

    port: int
    host: str = "127.0.0.1"
    token_file: str | None = None  # its content is the bearer token; None only on loopback
    strict: bool = False  # one rank that does not serve is a 503 of /health
    profiles: str | None = None  # directory of /start_profile; None: it is refused
    held_bytes: int = 512 << 20  # embeddings of all its requests together, from their size to the reader


class EncoderConfig(Part, frozen=True):
    batch_patches: int = 16_384  # patches of one forward
    preprocess_threads: int = 2
    cache_bytes: int = 256 << 20  # embeddings a rank remembers; 0: none, and nothing in flight is shared
    prepared_bytes: int = 1 << 30  # of media prepared for the tower at once
    canary_seconds: float = 10.0  # between two proofs of a rank that encodes nothing
    canary_deadline: float = 30.0
    ranks: int = 0  # how many the plan has; for the router
    http: EncoderHttp | None = None  # for the router


class TransferConfig(Part, frozen=True):
    backend: str = "zmq"  # what the plan settled on; never "auto" here
    protocol: str = ""  # of Mooncake: tcp | rdma | nvlink
    checksum: bool = False  # every write carries one, and its receiver verifies it
    embedding_bytes: int = 256 << 20  # the embedding pool of a prefill, language or mono rank


class GatewayConfig(Part, frozen=True):
    host: str = "127.0.0.1"
    port: int = 8000
    stages: list[Stage] = []  # model stages of the plan, so that the gateway can say what is not there
    answering: int = 1  # ranks of the plan that write answers, each Limits.inflight at once
    api_key: Secret | None = None  # None only on loopback
    strict: bool = False  # a field that nobody knows is refused
    media_hosts: list[str] = []  # media may come from there over http(s): "name", or "name:port"
    media_seconds: float = 10.0  # for one such file, redirects and all


class RankConfig(Part, frozen=True):
    """The plan's word on one rank: the same for every incarnation."""

    rank: RankName
    stage: Stage
    service: str  # "package.module:attribute" of the Service to run; chosen by the adapter
    model: ModelConfig
    threads: int = 1
    devices: list[LocalGpu] = []  # empty: CPU
    share: float = 1.0  # of each device
    memory_bytes: int = 0  # of each device that torch may take; 0: whatever is there
    gang: str | None = None
    limits: Limits = Limits()
    engine: EngineConfig = EngineConfig()
    encoder: EncoderConfig = EncoderConfig()
    transfer: TransferConfig = TransferConfig()
    gateway: GatewayConfig = GatewayConfig()
    heartbeat_seconds: float = 1.0


class RankSpec(Message, frozen=True):
    """What one incarnation reads from its pipe: the config, and where it is."""

    run: RunId
    cluster: str
    incarnation: Incarnation
    token: str  # the cluster's secret; presented in every Hello
    supervisor: str  # path of the daemon's unix socket for ranks
    sockets: str  # directory for this rank's own endpoints; short, 0700
    config: RankConfig
    part: str = ""  # a part of a rank's process, which the process's other parts reach and nobody else

    @property
    def rank(self) -> RankName:
        return self.config.rank

    def endpoint(self, purpose: str) -> str:
        """A ZMQ address that no other incarnation ever has: ``ipc://…/encoder-0.2.inbox``."""
        name = f"{self.sockets}/{self.rank.file_stem}.{self.incarnation}"
        return f"inproc://{name}.{self.part}.{purpose}" if self.part else f"ipc://{name}.{purpose}"

    def within(self, part: str) -> RankSpec:
        """The spec of a service that is one part of this rank: the same in all but its endpoints."""
        return msgspec.structs.replace(self, part=part)
