"""What an engine gets is what a checkpoint would hold, layer by layer; and it is proved that it arrived."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.checkpoint.export_scenario import MODELS
from tests.checkpoint.families import write_case
from tests.checkpoint.official import read_stored, same_bytes
from tests.families import FAMILIES
from tests.ranks import run_on_ranks
from tests.rl.engines.server import EngineServer, SharedMemory
from tests.rl.sync_scenario import Collector
from tests.tiny import build, moe_config
from xtuner_hf import Qwen3MoeForCausalLM
from xtuner_hf.checkpoint.export import export_to_hub
from xtuner_hf.checkpoint.export_plan import ExportError
from xtuner_hf.moe.lora import adopt_wrappers
from xtuner_hf.rl.engines.contract import EngineError
from xtuner_hf.rl.engines.local import LocalEngine
from xtuner_hf.rl.weight_sync import WeightSync, WeightSyncError


def model_of(seed: int, **config) -> Qwen3MoeForCausalLM:
    return build(Qwen3MoeForCausalLM, moe_config(**config), seed=seed)


def exported(model, folder: Path) -> dict[str, torch.Tensor]:
    export_to_hub(model, folder)
    return load_file(folder / "model.safetensors")


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_gets_what_a_checkpoint_holds_layer_by_layer(family, tmp_path):
    model, engine = FAMILIES[family].ours(), Collector()
    metrics = WeightSync(engine, tmp_path / "weights", probe_tokens=0)(model, "3")
    expected = exported(model, tmp_path / "hub")
    assert_same(engine.tensors, expected)
    assert metrics["weight_sync/gigabytes"] == sum(tensor.nbytes for tensor in expected.values()) / 1e9
    assert len(engine.layers) == 1 + model.config.num_hidden_layers
    for number, layer in enumerate(engine.layers[1:]):
        assert all(f".layers.{number}." in name for name in layer)
    assert engine.calls == ["pause", "begin_update", "end_update 3", "resume"]
    assert not (tmp_path / "weights").exists()


def test_a_folder_with_files_of_others_is_left_alone(tmp_path):
    """A sync emptied any folder that it was given: with folder="/dev/shm" all shared memory of the machine."""
    (tmp_path / "other").write_text("of somebody else")
    sync = WeightSync(Collector(), tmp_path, probe_tokens=0)
    with pytest.raises(ValueError, match=r"holds files of others.*weights say"):
        sync(model_of(0), "1")
    assert (tmp_path / "other").read_text() == "of somebody else"


def test_what_a_killed_sync_left_behind_goes(tmp_path):
    class Dies(Collector):
        def load(self, files) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WeightSync(Dies(), tmp_path / "weights", probe_tokens=0)(model_of(0), "1")
    assert list((tmp_path / "weights").glob("*.safetensors"))
    WeightSync(Collector(), tmp_path / "weights", probe_tokens=0)(model_of(0), "1")
    assert not (tmp_path / "weights").exists()


class SamplesOnly(LocalEngine):
    """As LMDeploy: no log-probabilities but of what it sampled."""

    scores_given_tokens = False

    def score(self, token_ids):
        raise AssertionError("it was asked for scores of given tokens")


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "lmdeploy", "samples only", None])
def test_the_engine_computes_what_the_trainer_does(dialect, tmp_path, monkeypatch):
    SharedMemory(monkeypatch)
    changes = {"router_correction_bias": True}  # a buffer, which decides the routes
    local = SamplesOnly if dialect == "samples only" else LocalEngine
    trainer, engine = model_of(0, **changes), local(model_of(1, **changes))
    trainer.model.layers[0].mlp.gate.e_score_correction_bias += torch.linspace(-0.3, 0.3, 8)
    is_served = dialect not in (None, "samples only")
    with EngineServer(dialect if is_served else "vllm", engine) as server:
        client = server.client(try_timeout=20) if is_served else engine
        sync = WeightSync(client, tmp_path / "weights")
        metrics = sync(trainer, "1")
        assert metrics["weight_sync/probe_difference"] < 1e-5
        with torch.no_grad():
            trainer.model.layers[2].mlp.experts.down_proj[7] *= 1.5
        assert sync._probe(trainer) > 1e-3  # the probe sees one expert of one layer
        assert sync(trainer, "2")["weight_sync/probe_difference"] < 1e-5
    assert client.version() == "2"
    assert_same(engine.model.state_dict(), trainer.state_dict())


@pytest.mark.parametrize(
    ("dialect", "drops", "verdict"),
    [
        ("vllm", "experts", "it takes no notice of its experts. "),
        ("sglang", "lm_head", "it takes no notice of its output head. "),
        ("vllm", "self_attn.v_proj", "it misreads its attention. "),  # it takes the others of that class
        ("lmdeploy", "experts", "it takes no notice of its experts. "),
        ("lmdeploy", ".", "attention, embeddings, experts, norms, output head, routers. "),  # stale
    ],
)
def test_tensors_that_an_engine_drops_are_named(dialect, drops, verdict, tmp_path, monkeypatch):
    SharedMemory(monkeypatch)
    small = {"num_hidden_layers": 2, "mlp_only_layers": []}
    with EngineServer(dialect, LocalEngine(model_of(1, **small)), drops=drops) as server:
        sync = WeightSync(server.client(try_timeout=20), tmp_path / "weights", probe_tokens=32)
        with pytest.raises(
            WeightSyncError, match=r"differ from the trainer's by up to .* \(tolerance 0\.001\)"
        ) as error:
            sync(model_of(0, **small), "1")
    assert verdict in str(error.value)


@pytest.mark.parametrize("local", [LocalEngine, SamplesOnly])
def test_tensors_that_an_engine_misreads_are_named(local, tmp_path):
    """As an engine does that packs experts when it starts and not when it reloads."""

    class Swaps(local):
        def end_update(self, version: str, folder: Path) -> None:
            def other(name: str) -> str:
                is_gate = "experts" in name and "gate_proj" in name
                return name.replace("gate_proj", "up_proj") if is_gate else name.replace("up_proj", "gate_proj")

            self._new = {other(n) if "experts" in n else n: t for n, t in self._new.items()}
            super().end_update(version, folder)

    trainer = model_of(0)
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    with pytest.raises(WeightSyncError, match="it misreads its experts"):
        WeightSync(Swaps(model_of(1)), tmp_path / "weights")(trainer, "1")
    assert_same(trainer.state_dict(), before)


@pytest.mark.parametrize("case", ["deepseek_v3_ragged", "gpt_oss", "qwen3_moe"])
def test_a_quantised_engine_gets_its_own_format(case, tmp_path):
    model_class, _ = write_case(tmp_path / "source", case)
    model, engine = model_class.from_pretrained(tmp_path / "source"), Collector()
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    WeightSync(engine, tmp_path / "weights", quantised_like=tmp_path / "source", probe_tokens=0)(model, "1")
    original, sent = read_stored(tmp_path / "source"), engine.tensors
    assert sent.keys() == original.keys()
    assert [n for n, t in original.items() if not same_bytes(sent[n], t)] == ["model.norm.weight"]


def adapted(seed: int = 0):
    """LoRA on attention and experts, away from its start at zero."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=targets, init_lora_weights=False)
    torch.manual_seed(seed)
    model = get_peft_model(model_of(0), lora)
    adopt_wrappers(model)
    return model


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_adapters_arrive_merged_and_stay_apart_in_the_trainer(dialect, tmp_path):
    trainer, engine = adapted(), LocalEngine(model_of(1))
    with EngineServer(dialect, engine) as server:
        sync = WeightSync(server.client(try_timeout=20), tmp_path / "weights")
        before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
        assert sync(trainer, "1")["weight_sync/probe_difference"] < 1e-4
        assert_same(trainer.state_dict(), before)
        with torch.no_grad():
            trainer.base_model.model.model.layers[2].mlp.experts.lora_B["default"].weight *= 3
        assert sync._probe(trainer) > 1e-3
        assert sync(trainer, "2")["weight_sync/probe_difference"] < 1e-4
    merged = trainer.merge_and_unload().state_dict()
    assert engine.model.state_dict().keys() == merged.keys()
    for name, tensor in engine.model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


def test_adapters_that_an_engine_drops_are_named(tmp_path):
    """The classes that are zeroed to find out are so with their adapters."""
    trainer = adapted()
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    with (
        EngineServer("vllm", LocalEngine(model_of(0)), drops="experts") as server,
        pytest.raises(WeightSyncError, match="it takes no notice of its experts"),
    ):
        WeightSync(server.client(try_timeout=20), tmp_path / "weights")(trainer, "1")
    assert_same(trainer.state_dict(), before)


def test_adapters_that_cannot_be_merged_are_refused(tmp_path):
    model = get_peft_model(model_of(0), LoraConfig(target_modules=["q_proj"], r=2, use_dora=True))
    with pytest.raises(ExportError, match="not plain LoRA"):
        WeightSync(Collector(), tmp_path / "weights")(model, "1")


def test_another_model_is_an_error(tmp_path):
    engine = LocalEngine(model_of(1, num_hidden_layers=1, mlp_only_layers=[]))
    with pytest.raises(EngineError, match=r"has no tensor .*: it is not the trainer's model"):
        WeightSync(engine, tmp_path / "weights")(model_of(0), "1")


def test_two_processes(tmp_path):
    """Both write their experts, neither ever holds a fused tensor; what fails on rank 0 is raised on both."""
    first, second = run_on_ranks("tests.rl.sync_scenario:sync_on_ranks", 2, folder=str(tmp_path))
    for name in ("qwen", "gpt_oss"):
        model = MODELS[name]()
        assert_same(first[name]["tensors"], exported(model, tmp_path / f"{name} whole"))
        assert any(ranks == {0, 1} for ranks in first[name]["ranks"])
        assert not second[name]["tensors"]
        fused = max(p.nbytes for n, p in model.named_parameters() if "experts" in n)
        assert max(first[name]["largest"], second[name]["largest"]) <= fused / 2
    assert first["failure"] == "out of memory"
    assert second["failure"] == "on rank 0: out of memory"
    assert max(first["seconds"], second["seconds"]) < 10


def test_training_with_an_engine_on_each_rank(tmp_path):
    """The engines start with other weights and follow the trainer's; with its routes and log-probabilities, no gap."""
    (single,) = run_on_ranks("tests.rl.sync_scenario:train_on_ranks", 1, folder=str(tmp_path / "1"))
    ranks = run_on_ranks("tests.rl.sync_scenario:train_on_ranks", 2, folder=str(tmp_path / "2"))
    for result in (single, *ranks):
        for log in result["logs"] + result["adapted"]:
            assert log["weight_sync/probe_difference"] < 1e-4
            assert abs(log["mismatch/k3"]) < 1e-8  # not negative but by rounding
            assert log["mismatch/logp_difference_max"] < 1e-4
    for result in ranks:  # in the second run the engine of rank 1 fails
        assert "the server is gone" in result["failure"]
        assert result["seconds"] < 20
