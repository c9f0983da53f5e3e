"""From a file to ranks with commands and environments: every shipped profile, checkpoints, ports."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections import Counter
from pathlib import Path

import pytest

import epdctl
from epdctl.adapters import ADAPTERS, Found, make_plan
from epdctl.adapters.native import SERVICES
from epdctl.control.handover import HANDOVER, Handover
from epdctl.errors import PlacementError, TopologyError, UserError
from epdctl.ids import MODEL_STAGES, Stage, new_run_id
from epdctl.topology.hardware import Hardware
from epdctl.topology.plan import Plan
from epdctl.topology.ports import why_not_free
from epdctl.topology.profiles import list_profiles, profile_text
from epdctl.topology.schema import json_schema
from epdctl.wire.message import to_json
from epdctl.wire.variables import MOONCAKE
from tests.unit.topology.support import UUIDS, machine, rank, seats

PROFILES = Path(epdctl.__file__).parent.parent / "profiles"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "dtype": "bfloat16"}))
    return directory


def planned(path: Path, checkpoint: Path, hardware: Hardware, **environ: str) -> Plan:
    return make_plan(path, environ={"EPDCTL_MODEL": str(checkpoint), **environ}, found=Found(hardware, {}))


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "epdctl.yaml"
    file.write_text(text)
    return file


SHAPES = {
    "cpu-demo": (0, {"encoder": 2, "prefill": 1, "decode": 1}),
    "cpu-mono": (0, {"mono": 1}),
    "1gpu": (1, {"encoder": 1, "prefill": 1, "decode": 1}),
    "2gpu-e1-pd1": (2, {"encoder": 1, "language": 1}),
    "4gpu-e2-p1-d1": (4, {"encoder": 2, "prefill": 1, "decode": 1}),
    "8gpu-e4-p2-d2": (8, {"encoder": 4, "prefill": 2, "decode": 2}),
}


def test_every_profile_is_planned_here() -> None:
    assert set(list_profiles()) == set(SHAPES)


@pytest.mark.parametrize("profile", SHAPES)
def test_profiles(profile: str, checkpoint: Path) -> None:
    gpus, stages = SHAPES[profile]
    made = planned(PROFILES / f"{profile}.yaml", checkpoint, machine(gpus))
    front = {"gateway": 1, "encoder-router": 1} if "encoder" in stages else {"gateway": 1}
    assert Counter(one.stage.value for one in made.ranks) == front | stages
    assert {one.value for one in made.ranks[0].config.gateway.stages} == set(stages)
    assert made.cluster == profile
    used = {one.uuid for each in made.ranks for one in each.gpus}
    assert used == set(UUIDS[:gpus])
    assert {one.config.model.dtype for one in made.ranks} == {"bfloat16" if gpus else "float32"}
    assert {one.config.model.name for one in made.ranks} == {"tiny"}
    assert planned(PROFILES / f"{profile}.yaml", checkpoint, machine(gpus)) == made


@pytest.mark.parametrize("profile", [name for name, (gpus, _) in SHAPES.items() if gpus])
def test_a_gpu_profile_is_refused_on_a_smaller_machine(profile: str, checkpoint: Path) -> None:
    with pytest.raises(PlacementError, match=r"no GPU with room for|this machine shows none|shows no GPU"):
        planned(PROFILES / f"{profile}.yaml", checkpoint, machine(SHAPES[profile][0] - 1))


def test_the_schema_file_beside_the_profiles_is_current() -> None:
    assert json.loads((PROFILES / "epdctl.schema.json").read_text()) == json_schema(), (
        "write it again: epdctl schema > profiles/epdctl.schema.json"
    )


@pytest.mark.parametrize("profile", SHAPES)
def test_a_profile_tells_the_editor_its_schema(profile: str) -> None:
    assert profile_text(profile).startswith("# yaml-language-server: $schema=./epdctl.schema.json\n")
    assert profile_text(profile) == (PROFILES / f"{profile}.yaml").read_text()


def test_an_unknown_profile() -> None:
    with pytest.raises(UserError, match="no profile is called 'cpu_demo'") as caught:
        profile_text("cpu_demo")
    assert str(caught.value.hint).startswith("did you mean cpu-demo? there are: 1gpu, ")


def test_what_a_rank_is_run_with(checkpoint: Path) -> None:
    kept = {
        "PATH": "/bin",
        "HOME": "/root",
        "LC_ALL": "C",
        "PYTHONPATH": "/src",
        "HF_HOME": "/hf",
        "EPDCTL_LOG": "debug",
    }
    dropped = {
        "HF_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "http_proxy": "http://proxy",
        "EPDCTL_PORT": "8055",
    }
    replaced = {"CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "64"}
    environ = kept | dropped | replaced
    made = planned(PROFILES / "2gpu-e1-pd1.yaml", checkpoint, machine(2, cores=6), **environ)
    encoder, language, gateway = (rank(made, name) for name in ("encoder/0", "language/0", "gateway/0"))
    assert encoder.argv[1:] == ("-m", "epdctl.rank")
    assert encoder.env == kept | {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": UUIDS[0],
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "KINETO_LOG_LEVEL": "6",
        "MKL_NUM_THREADS": "3",
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    assert language.env["CUDA_VISIBLE_DEVICES"] == UUIDS[1]
    assert gateway.env["CUDA_VISIBLE_DEVICES"] == ""
    assert gateway.env["OMP_NUM_THREADS"] == "1"
    assert made.gateway_url == "http://127.0.0.1:8055"


@pytest.mark.parametrize("protocol", ["tcp", "rdma", "nvlink"])
def test_mooncake_is_told_its_protocol_and_no_other(checkpoint: Path, tmp_path: Path, protocol: str) -> None:
    text = (PROFILES / "2gpu-e1-pd1.yaml").read_text().partition("\ntransfer:")[0]
    file = tmp_path / "shop.yaml"
    file.write_text(f"{text}\ntransfer: {{backend: mooncake, protocol: {protocol}}}\n")
    engines = dataclasses.replace(machine(2), mooncake="mooncake-transfer-engine-cuda13")
    made = planned(file, checkpoint, engines)
    own = {name for name in rank(made, "encoder/0").env if name in MOONCAKE.values()}
    assert own == {MOONCAKE[protocol]}


def test_a_cpu_rank_sees_no_gpu(checkpoint: Path) -> None:
    made = planned(PROFILES / "cpu-demo.yaml", checkpoint, machine(4))
    assert set(seats(made).values()) == {"cpu"}
    assert {one.env["CUDA_VISIBLE_DEVICES"] for one in made.ranks} == {""}


def test_every_served_stage_has_a_service(checkpoint: Path) -> None:
    assert set(SERVICES) == MODEL_STAGES | {Stage.GATEWAY, Stage.ENCODER_ROUTER}
    made = planned(PROFILES / "cpu-demo.yaml", checkpoint, machine())
    assert all(one.config.service == SERVICES[one.stage] for one in made.ranks)
    assert made.adapter in ADAPTERS


@pytest.mark.parametrize("profile", SHAPES)
def test_a_plan_survives_the_way_to_the_daemon(profile: str, checkpoint: Path) -> None:
    made = planned(PROFILES / f"{profile}.yaml", checkpoint, machine(SHAPES[profile][0]), PATH="/bin")
    sent = Handover(plan=made, run=new_run_id(), state_dir="/s")
    assert HANDOVER.decode(HANDOVER.encode(sent)) == sent


def test_a_plan_can_be_written_as_json(checkpoint: Path) -> None:
    made = planned(PROFILES / "1gpu.yaml", checkpoint, machine(1))
    assert json.loads(to_json(made.ranks[2].config))["rank"] == "encoder/0"


def test_the_name_given_goes_before_the_file_s(checkpoint: Path) -> None:
    environ = {"EPDCTL_MODEL": str(checkpoint)}
    made = make_plan(PROFILES / "cpu-demo.yaml", environ=environ, found=Found(machine(), {}), name="mine")
    assert made.cluster == "mine"
    with pytest.raises(UserError, match="'My cluster' cannot name a cluster"):
        make_plan(PROFILES / "cpu-demo.yaml", environ=environ, name="My cluster")


# checkpoints


def refused(tmp_path: Path, path: str, environ: dict[str, str] | None = None, more: str = "") -> str:
    file = written(tmp_path, f"model:\n  path: {path}\n{more}stages: {{language: {{}}}}\n")
    with pytest.raises(TopologyError) as caught:
        make_plan(file, environ=environ or {}, found=Found(machine(), {}))
    (mistake,) = caught.value.mistakes
    assert mistake.place == f"{file}:2:9"
    return f"{mistake.problem} ({mistake.remedy})"


def test_no_such_checkpoint(tmp_path: Path) -> None:
    assert f"there is no directory {tmp_path}/none" in refused(tmp_path, f"{tmp_path}/none")


def test_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no config.json" in refused(tmp_path, str(tmp_path))


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    assert "m is a file (name the checkpoint's directory)" in refused(tmp_path, f"{tmp_path}/m")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"model_type": "llama"}', "model_type 'llama' of"),
        ("{}", "model_type None of"),
    ],
)
def test_a_checkpoint_that_is_not_served(checkpoint: Path, tmp_path: Path, config: str, problem: str) -> None:
    (checkpoint / "config.json").write_text(config)
    assert problem in refused(tmp_path, str(checkpoint))


def test_a_family_that_was_nearly_meant(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "qwen2_vl"}')
    assert "(served are: llava_onevision, qwen2_5_vl, qwen2_audio, qwen3_vl; did you mean 'qwen2_5_vl'?)" in refused(
        tmp_path, str(checkpoint)
    )


def test_a_hub_id_that_was_never_fetched(tmp_path: Path) -> None:
    told = refused(tmp_path, "Qwen/Tiny-VL", {"HF_HOME": str(tmp_path / "hf")}, more="  revision: v2\n")
    assert f"'Qwen/Tiny-VL' is neither a directory here nor in the hub's cache {tmp_path}/hf/hub" in told
    assert "(fetch it: hf download Qwen/Tiny-VL --revision v2)" in told


def test_a_hub_id_in_the_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hf" / "models--Qwen--Tiny-VL"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    file = written(tmp_path, "model: {path: Qwen/Tiny-VL}\nstages: {language: {}}\n")
    environ = {"HF_HUB_CACHE": str(tmp_path / "hf")}
    model = make_plan(file, environ=environ, found=Found(machine(), {})).ranks[0].config.model
    assert (model.path, model.name) == (str(snapshot), "Qwen/Tiny-VL")


def test_home_is_the_given_one(checkpoint: Path, tmp_path: Path) -> None:
    file = written(tmp_path, "model: {path: ~/tiny}\nstages: {language: {}}\n")
    made = make_plan(file, environ={"HOME": str(tmp_path)}, found=Found(machine(), {}))
    assert made.ranks[0].config.model.path == str(checkpoint)


# ports


def test_a_port_is_free_until_somebody_listens(tmp_path: Path, checkpoint: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert "pid" in (why_not_free("127.0.0.1", port) or "")
        file = written(
            tmp_path, f"model: {{path: {checkpoint}}}\nstages: {{language: {{}}}}\ngateway: {{port: {port}}}\n"
        )
        with pytest.raises(PlacementError, match=f"port {port} of 127.0.0.1 is in use by "):
            make_plan(file, environ={}, found=Found(machine()))
    assert why_not_free("127.0.0.1", port) is None


BUSY = """\
model: {path: none-such}
gateway: {port: PORT}
stages:
  encoder: {gpus: [7], batch_patch: 9}
  language: {gpus: [6], kv_tokens: many}
"""


def mistakes(file: Path, found: Found) -> list[tuple[str, str]]:
    """Line and path of each."""
    with pytest.raises(TopologyError) as caught:
        make_plan(file, environ={}, found=found)
    return [(one.place.split(":")[-2], one.path) for one in caught.value.mistakes]


def test_what_the_machine_lacks_is_told_with_the_mistakes_of_the_file_in_its_order(tmp_path: Path) -> None:
    file = written(tmp_path, BUSY.replace("PORT", "8123"))
    assert mistakes(file, Found(machine(1), {8123: "in use by nginx"})) == [
        ("1", "model.path"),
        ("2", "gateway.port"),
        ("4", "stages.encoder.gpus[0]"),
        ("4", "stages.encoder.batch_patch"),
        ("5", "stages.language.gpus[0]"),
        ("5", "stages.language.kv_tokens"),
    ]


def test_what_only_follows_from_a_mistake_is_not_told(tmp_path: Path) -> None:
    text = BUSY.replace("PORT", "80000").replace("[6]", "all").replace("none-such", "${NONE}")
    assert mistakes(written(tmp_path, text), Found(machine(0), {8000: "in use by nginx"})) == [
        ("1", "model.path"),
        ("2", "gateway.port"),
        ("4", "stages.encoder.batch_patch"),
        ("5", "stages.language.gpus"),
        ("5", "stages.language.kv_tokens"),
    ]


def test_gpus_that_cannot_be_read_are_told_after_the_mistakes_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sick(environ: object) -> Hardware:
        raise PlacementError("the GPUs cannot be read: lost", hint="nvidia-smi says more")

    monkeypatch.setattr("epdctl.adapters.planning.probe", sick)
    file = written(tmp_path, "model: {path: shapes-vl}\nstages: {language: {kv_tokens: many}}\n")
    with pytest.raises(TopologyError) as caught:
        make_plan(file, environ={}, found=Found(ports_in_use={}))
    assert str(caught.value).splitlines()[1:] == ["this machine: the GPUs cannot be read: lost (nvidia-smi says more)"]


def test_the_port_of_a_cluster_that_is_up_is_known_for_its_own(tmp_path: Path, checkpoint: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        text = f"model: {{path: {checkpoint}}}\nstages: {{language: {{}}}}\ngateway: {{port: {port}}}\n"
        file, found = written(tmp_path, text), Found(machine(), held={port: "shop"})
        assert make_plan(file, environ={}, found=found, name="shop").notes[-1] == (
            f"gateway.port: {port} is in use by this cluster, which is up"
        )
        with pytest.raises(PlacementError, match="is in use by the cluster 'shop', which is up"):
            make_plan(file, environ={}, found=found, name="stall")


def test_the_shipped_model_is_found_by_its_name_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for profile in ("cpu-demo", "cpu-mono"):
        made = make_plan(PROFILES / f"{profile}.yaml", environ={}, found=Found(machine(), {}))
        assert {rank.config.model.name for rank in made.ranks} == {"shapes-vl"}
        assert Path(made.ranks[0].config.model.path, "model.safetensors").is_file()
