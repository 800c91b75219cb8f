"""Cluster files: what ships, what a file may say, and what every refusal says."""

from __future__ import annotations

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.request import Role
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.roofline import RooflineCost, reference_cost
from kvasir.costs.shape import ModelShape
from kvasir.costs.shapes import SHAPES
from kvasir.engine import builtin_model
from kvasir.engine.checkpoint import read_spec
from kvasir.simulator.clusters import load_cluster, shipped_names, with_split
from kvasir.simulator.clusters.split import split_of
from kvasir.simulator.spec import ClusterSpec, MemoryKind

BASE = {
    "name": '"mine"',
    "model": '"llama3-70b"',
    "hardware": '"a800"',
    "nodes": "16",
    "split": '"8P8D"',
    "dram": '"3Mtok"',
}
SIZES = (
    "num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=128, vocab=100, num_params=1000,"
    " dtype_bytes=2"
)


def text(**changes: str | None) -> str:
    """The base file with keys changed, or taken away by None."""
    return "\n".join(f"{key} = {value}" for key, value in (BASE | changes).items() if value is not None)


def load(**changes: str | None) -> ClusterSpec:
    return load_cluster(text(**changes))


def roles(cluster: ClusterSpec) -> list[Role]:
    return [i.role for i in cluster.instances]


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_cluster_bears_its_file_s_name_and_can_do_both_phases(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert any(r.can_prefill for r in roles(cluster))
    assert any(r.can_decode for r in roles(cluster))
    assert {i.node for i in cluster.instances} == {n.id for n in cluster.nodes}


def test_what_ships() -> None:
    assert shipped_names() == ("h200-8", "h800-16", "laptop", "paper-16")


def test_paper_16_is_the_reference_model() -> None:
    cluster = load_cluster("paper-16")
    assert cluster.costs == reference_cost()
    assert roles(cluster) == [Role.PREFILL] * 8 + [Role.DECODE] * 8
    assert cluster.block_tokens == 512
    assert cluster.kv_bytes_per_token == 327_680
    assert {n.dram_tokens for n in cluster.nodes} == {3_000_000}
    assert {n.network_bandwidth for n in cluster.nodes} == {80e9}
    assert {i.kv_tokens for i in cluster.instances} == {int((8 * 80e9 - 140e9) // 327_680)}


def test_h200_8_has_an_ssd_below_its_dram() -> None:
    node = load_cluster("h200-8").nodes[0]
    assert node.ssd_tokens == 3_200 * 10**9 // 327_680
    assert node.ssd_read_bandwidth > node.ssd_write_bandwidth > 0


def test_the_laptop_is_one_shared_node_with_the_built_in_model() -> None:
    cluster = load_cluster("laptop")
    assert cluster.memory is MemoryKind.SHARED
    assert len(cluster.nodes) == 1
    assert {i.kv_tokens for i in cluster.instances} == {cluster.nodes[0].dram_tokens}
    assert SHAPES["kvasir-small"] == read_spec(builtin_model.path(), block_tokens=64).shape


def test_dram_is_tokens_or_bytes() -> None:
    kv_bytes = SHAPES["llama3-70b"].kv_bytes_per_token
    assert load(dram='"1TiB"').nodes[0].dram_tokens == 2**40 // kv_bytes
    assert load(dram="1_000_000_000").nodes[0].dram_tokens == 10**9 // kv_bytes
    assert load(dram='"250ktok"').nodes[0].dram_tokens == 250_000
    assert load(dram='"0Mtok"').nodes[0].dram_tokens == 0


def test_groups_of_nodes_have_their_own_sizes() -> None:
    nodes = load(nodes='[{count=8}, {count=8, dram="1Mtok", network="10GB/s", ssd="1TB"}]').nodes
    assert [n.id for n in nodes] == [f"n{i:02d}" for i in range(16)]
    assert (nodes[7].dram_tokens, nodes[7].network_bandwidth, nodes[7].ssd_tokens) == (3_000_000, 80e9, 0)
    assert (nodes[8].dram_tokens, nodes[8].network_bandwidth) == (1_000_000, 10e9)
    assert nodes[8].ssd_tokens > 0


def test_two_instances_on_a_node_have_half_of_its_devices_each() -> None:
    whole, halves = load(model='"llama3-8b"'), load(model='"llama3-8b"', instances="2", split='"16P16D"')
    assert isinstance(whole.costs, RooflineCost)
    assert isinstance(halves.costs, RooflineCost)
    assert halves.costs.hardware.devices * 2 == whole.costs.hardware.devices
    assert [i.node for i in halves.instances[:3]] == ["n00", "n00", "n01"]
    assert halves.instances[0].kv_tokens < whole.instances[0].kv_tokens / 2


def test_hardware_can_be_overridden_or_written_out() -> None:
    faster = load(hardware='{base="a800", flops=1e15, memory-bytes="141GB"}').costs
    assert isinstance(faster, RooflineCost)
    assert (faster.hardware.flops, faster.hardware.memory_bytes, faster.hardware.devices) == (1e15, 141 * 10**9, 8)
    own = '{devices=4, flops=1e15, memory_bandwidth="3TB/s", memory_bytes="80GB", network_bandwidth="50GB/s"}'
    assert load(hardware=own).nodes[0].network_bandwidth == 50e9


def test_a_network_of_the_file_is_also_what_costs_predict_with() -> None:
    cluster = load(network='"10GB/s"', network_latency='"1ms"')
    assert cluster.nodes[0].network_bandwidth == 10e9
    assert cluster.costs.transfer_s(10 * 10**9) == pytest.approx(1.001)


def test_a_model_is_a_name_a_table_or_a_directory() -> None:
    seen: list[str] = []

    def model_at(path: str) -> ModelShape:
        seen.append(path)
        return SHAPES["qwen3-8b"]

    assert load(model=f"{{{SIZES}}}").kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert load_cluster(text(model='"./mine"'), model_at=model_at).num_layers == 36
    assert seen == ["./mine"]


def test_pipelines_can_be_kept_short_and_on_one_node() -> None:
    assert (load().max_stages, load().stages_on_one_node) == (None, False)
    cluster = load(stages="2", stages_on_one_node="true")
    assert (cluster.max_stages, cluster.stages_on_one_node) == (2, True)


def test_steps_can_be_uneven_and_hand_offs_slow() -> None:
    assert (load().hand_off_s, load().step_noise) == (0.0, ())
    cluster = load(hand_off='"5ms"', step_noise="[0.9, 1, 1.3]")
    assert (cluster.hand_off_s, cluster.step_noise) == (0.005, (0.9, 1.0, 1.3))


def test_costs_can_come_from_a_profile() -> None:
    fitted = FittedCost(PrefillFit(0.01, 1e-4, 0.0, 0.0), DecodeFit(0.01, 1e-4, 0.0), 0.0, 1e9)
    assert load_cluster(text(costs='{profile="p.json"}'), profile_at=lambda path: fitted).costs is fitted


@pytest.mark.parametrize("split", ["12P4D", "8P4D4M", "16M", "1P15D"])
def test_a_split_gives_out_roles_and_reads_back(split: str) -> None:
    assert split_of(with_split(load(), split)) == split


def test_elastic_makes_every_instance_mixed() -> None:
    assert set(roles(load(split='"elastic"'))) == {Role.MIXED}


def test_none_of_a_role_may_be_said() -> None:
    assert roles(load(split='"8P8D0M"')) == roles(load())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splitt": '"8P8D"'}, "cluster file: unknown key 'splitt'; did you mean 'split'?"),
        ({"nodes": '[{drm="1GB"}]'}, "cluster file: nodes[0]: unknown key 'drm'; did you mean 'dram'?"),
        ({"hardware": '{bas="a800"}'}, "cluster file: hardware: unknown key 'bas'; did you mean 'base'?"),
        ({"split": None}, "cluster file: split is missing"),
        ({"max_batch": '"many"'}, "cluster file: max_batch: expected int, got 'many'"),
        ({"split": '"9P8D"'}, "cluster mine: split 9P8D on 16 instances: 17 asked, 16 there"),
        ({"split": '"7P8D"'}, "cluster mine: split 7P8D on 16 instances: 15 asked, 16 there"),
        (
            {"split": '"0P16D"'},
            "cluster mine: split 0P16D: no instance can prefill; expected for example 8P8D, 4P4D8M or elastic",
        ),
        ({"split": '"16P"'}, "cluster mine: split 16P: no instance can decode; expected for example 8P8D, 4P4D8M or elastic"),
        ({"split": '"half"'}, "cluster mine: split: got 'half', expected for example 8P8D, 4P4D8M or elastic"),
        ({"split": '"8P8P"'}, "cluster mine: split: got '8P8P', expected for example 8P8D, 4P4D8M or elastic"),
        (
            {"model": '"llama3-405b"'},
            "cluster mine: the model's weights (756.0 GiB) do not fit an instance's memory (596.0 GiB); "
            "a smaller model, more memory, or fewer instances per node",
        ),
        ({"model": '"llama3-70"'}, "cluster mine: unknown model 'llama3-70'; did you mean 'llama3-70b'?"),
        ({"hardware": '"a8000"'}, "cluster mine: unknown hardware 'a8000'; did you mean 'a800'?"),
        (
            {"hardware": "{devices=8}"},
            "cluster mine: hardware.flops is missing (or give a base: a800, h800, h200, cpu-laptop)",
        ),
        (
            {"hardware": '{base="a800", flops_efficiency=1.5}'},
            "cluster mine: hardware.flops_efficiency: got 1.5, expected more than 0 and at most 1",
        ),
        ({"dram": "-1"}, "cluster mine: dram: got -1, expected a size such as 1TiB or 3Mtok, 0 or more"),
        ({"dram": '"-3Mtok"'}, "cluster mine: dram: got '-3Mtok', expected a size such as 1TiB or 3Mtok, 0 or more"),
        ({"network": "-80"}, "cluster mine: network: got -80.0, expected bytes a second, 0 or more"),
        ({"network": '"fast"'}, "cluster mine: network: got 'fast', expected a bandwidth such as 80GB/s"),
        ({"nodes": "0"}, "cluster mine: nodes: got 0, expected at least 1"),
        ({"instances": "3"}, "cluster mine: instances: got 3, expected a divisor of the 8 devices of a node"),
        ({"block_tokens": "0"}, "cluster mine: block_tokens: got 0, expected at least 1"),
        ({"memory": '"hbm"'}, "cluster mine: memory: got 'hbm', expected device or shared"),
        (
            {"costs": '"guess"'},
            "cluster mine: costs: got 'guess', expected roofline, reference or { profile = 'file.json' }",
        ),
        ({"heartbeat": "0"}, "cluster mine: heartbeat: got 0, expected more than 0"),
        ({"stages": "0"}, "cluster mine: stages: got 0, expected at least 1"),
        ({"step_noise": "[1.0, 0.0]"}, "cluster mine: step_noise: got 0, expected more than 0"),
        ({"step_noise": "1.1"}, "cluster file: step_noise: expected array, got 1.1"),
        (
            {"network_latency": '"-1s"'},
            "cluster mine: network_latency: not a duration: '-1s'; write for example 30s, 100ms or 10m",
        ),
        (
            {"memory": '"shared"', "dram": '"1000tok"'},
            "cluster mine: dram: got room for 1000 tokens of KV, expected at least two blocks (1024)",
        ),
        (
            {"block_tokens": "8_000_000"},
            "cluster mine: an instance's memory beside the weights: got room for 1525878 tokens of KV, "
            "expected at least two blocks (16000000)",
        ),
    ],
)
def test_what_cannot_work_is_one_line(changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert str(caught.value) == message


def test_an_unknown_name_lists_those_that_ship() -> None:
    with pytest.raises(ConfigError, match=r"no cluster 'paper16'; a TOML file, or one of h200-8, .* did you mean 'paper-16'\?"):
        load_cluster("paper16")


def test_what_is_not_toml_is_refused() -> None:
    with pytest.raises(ConfigError, match="cluster file is not TOML"):
        load_cluster("name = ")


def test_the_table_s_weights_are_those_of_the_published_models() -> None:
    published = {"llama3-8b": 8.03e9, "llama3-405b": 405.9e9, "qwen3-32b": 32.8e9, "qwen3-8b": 8.19e9, "mistral-7b": 7.24e9}
    assert {name: SHAPES[name].num_params for name in published} == pytest.approx(published, rel=2e-3)
