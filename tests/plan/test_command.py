from __future__ import annotations

import json
import logging

import pytest
from transformers import Qwen2Config

from tests.families import ALL_FAMILIES
from tests.models import published
from xtuner_hf.cli import main
from xtuner_hf.models.manifest import meta_model
from xtuner_hf.plan.devices import device_key, device_names, find_device
from xtuner_hf.plan.models import find_config, model_names


@pytest.fixture
def folder(tmp_path):
    config = ALL_FAMILIES["qwen3_moe"].make_config(num_hidden_layers=8, mlp_only_layers=[])
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_page_and_pictures(folder, tmp_path, capsys):
    arguments = ["--gpus", "8", "--ep", "4", "--seq-len", "64", "--out", str(tmp_path / "out")]
    main(["plan", str(folder), *arguments])
    text = capsys.readouterr().out
    for part in ("fits:", "Memory of a rank", "Time of a step", "tokens/s a device", "ep all-to-all", "twice as often"):
        assert part in text
    assert (tmp_path / "out" / "plan.png").stat().st_size > 10_000
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {"X", "C", "M"} == {event["ph"] for event in events}
    ends = {}
    for event in events:  # one thing at a time on each track
        if event["ph"] == "X":
            assert event["ts"] >= ends.get(event["tid"], 0) - 1e-3
            ends[event["tid"]] = event["ts"] + event["dur"]


def test_planning_leaves_the_logs_of_its_process_alone(folder, capsys):
    """Warnings of what ran later in the same process were gone."""
    before = logging.getLogger("xtuner_hf").level
    main(["plan", str(folder), "--gpus", "2", "--device", "h100", "--seq-len", "64", "--json"])
    assert logging.getLogger("xtuner_hf").level == before


def test_adapters_of_a_base_in_bf16(folder, capsys):
    """One process: the base rests in two bytes a parameter, and its adapters have all of the optimizer's states."""
    main(
        ["plan", str(folder), *["--gpus", "1", "--seq-len", "64", "--lora-rank", "8", "--dtype", "bfloat16", "--json"]]
    )
    plan = json.loads(capsys.readouterr().out)
    assert (plan["job"]["lora_rank"], plan["job"]["dtype"]) == (8, "bfloat16")
    base = parameters(find_config(folder))
    adapters = plan["job"]["parameters"] - base
    assert 0 < adapters < base
    assert plan["balanced"]["resting_gib"] * 2**30 == pytest.approx(2 * base + 12 * adapters, rel=0.02)


def test_json(folder, capsys):
    main(["plan", str(folder / "config.json"), "--gpus", "2", "--seq-len", "64", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["job"]["ranks"] == 2
    assert plan["unbalanced"] is None
    assert plan["balanced"]["allocated_gib"] > plan["balanced"]["resting_gib"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qwen3-30b-a3b", "--gpus", "8", "--device", "h900"], "no device 'h900' in the table; it has: h100"),
        (["qwen3-30b-a3b", "--gpus", "8", "--ep", "3"], "ep_size 3 does not divide"),
        (["qwen3-30b-a3b", "--gpus", "32", "--ep", "16"], "ep_size 16 is larger than a node"),
        (["qwen3-30b-a3b", "--gpus", "12"], "12 ranks do not make whole nodes of 8"),
        (["qwen3-32b", "--gpus", "8", "--ep", "8"], "the model has no experts"),
        (["qwen3-30b-a3b", "--gpus", "1048576"], "more than the 16384 that can be simulated"),
        (["no-such-model", "--gpus", "8"], "no known model; known are: qwen3-0.6b"),
        (["qwen3-30b-a3b", "--gpus", "0"], "a job of 0 ranks"),
        (["qwen3-30b-a3b", "--gpus", "8", "--document-len", "9999"], "documents of 9999 tokens do not fit"),
        (["qwen3-30b-a3b", "--gpus", "8", "--tiles-per-row", "3"], "qwen3_moe reads no images"),
        (["intern-s1", "--gpus", "8", "--tiles-per-row", "17"], "17 tiles of 256 tokens do not fit into rows of 4096"),
        (["qwen3-30b-a3b", "--gpus", "8", "--device", "a100", "--fp8"], "has no FP8 products"),
        (["qwen3-30b-a3b", "--gpus", "8", "--fp8", "--lora-rank", "8"], "no kernel for adapters on experts"),
        (["qwen3-30b-a3b", "--gpus", "8", "--lora-rank", "0"], "lora_rank is 0"),
        (["qwen3-30b-a3b", "--gpus", "8", "--mtp-loss-coef", "0.3"], "no multi-token prediction layers"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said):
    with pytest.raises(SystemExit, match=r"^xtuner-hf plan: ") as error:
        main(["plan", *arguments])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_family_that_is_not_here(tmp_path):
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="no causal language model of model_type 'qwen2'"):
        main(["plan", str(tmp_path), "--gpus", "8"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="is no configuration of a model"):
        main(["plan", str(tmp_path), "--gpus", "8"])


@pytest.mark.parametrize("device", device_names())
def test_the_table_of_devices(device):
    found = find_device(device)
    figures = {name for name, value in vars(found).items() if isinstance(value, float | int)} | {"efficiencies"}
    assert figures == set(found.sources), "each figure has its source, and no other"
    assert [device_key(f"NVIDIA {part} 80GB") for part in found.reported_as] == [device] * len(found.reported_as)
    assert found.memory_gib > found.outside_gib
    assert all(0 < value <= 1 for value in found.efficiencies.values())


def test_the_table_and_the_throughput_meter_know_the_same_rates():
    from xtuner_hf.device import data_sheet_flops

    for key in device_names():
        if key in ("h100", "h800", "h200", "b200", "a100"):
            assert find_device(key).bf16_flops == data_sheet_flops(f"NVIDIA {key.upper()}")


def test_measured_efficiencies(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"device": "h100", "efficiencies": {"dense_matmul": 0.5}}))
    assert find_device("h100", file).efficiencies["dense_matmul"] == 0.5
    assert find_device("h100", file).efficiencies["memory"] == find_device("h100").efficiencies["memory"]
    refused = ("{}", '{"efficiencies": {"typing": 0.5}}', '{"efficiencies": {"memory": 7}}', "[]")
    for content in (*refused, '{"device": "a100", "efficiencies": {}}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=str(file)):
            find_device("h100", file)


def parameters(config) -> int:
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def test_known_models_are_the_published_ones():
    a3b, a22b = (published.qwen3_moe(2048, 48, 32, 4, 128, 768), published.qwen3_moe(4096, 94, 64, 4, 128, 1536))
    expected = {
        "qwen3-0.6b": published.qwen3_dense(1024, 3072, 28, 16, True),
        "qwen3-32b": published.qwen3_dense(5120, 25600, 64, 64, False),
        "qwen3-30b-a3b": a3b,
        "qwen3-235b-a22b": a22b,
        "qwen3-coder-480b-a35b": published.qwen3_moe(6144, 62, 96, 8, 160, 2560),
        "gpt-oss-20b": published.gpt_oss(24, 32),
        "gpt-oss-120b": published.gpt_oss(36, 128),
        "glm-4.5-air": published.glm4_moe(),
        "deepseek-v3": published.deepseek_v3(),
        "kimi-k2": published.kimi_k2(),
        "internvl3.5-30b-a3b": published.internvl(a3b, published.VIT_300M),
        "internvl3.5-241b-a28b": published.internvl(a22b, published.VIT_6B),
        "intern-s1": published.interns1(a22b, published.VIT_6B),
    }
    assert list(expected) == model_names()
    for name, config in expected.items():
        assert find_config(name).to_dict() == config.to_dict(), name
