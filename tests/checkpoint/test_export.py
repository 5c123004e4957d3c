"""What the owning ranks write is what one process writes, tensor by tensor; and nobody held a whole fused tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.checkpoint.export_scenario import LAYOUTS, MODELS, Spy, step_, tiny_qwen
from tests.checkpoint.runs import make_trainer, tiny_tokenizer
from tests.families import FAMILIES
from tests.ranks import run_on_ranks
from xtuner_hf import AutoModelForCausalLM, IncompleteCheckpointError
from xtuner_hf.checkpoint.export import export_to_hub, write_configs
from xtuner_hf.checkpoint.export_plan import ExportError
from xtuner_hf.checkpoint.folder import SHARDS, begin, commit
from xtuner_hf.checkpoint.resume import training_state
from xtuner_hf.cli import main

SCENARIO = "tests.checkpoint.export_scenario"
# gate_up_proj of the tiny Qwen3-MoE: 8 experts x 2 x 64 x 32 fp32.
MTP_FAMILIES = ("deepseek_v3", "kimi_k2", "glm4_moe")
FUSED_BYTES = 8 * 2 * 64 * 32 * 4


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_checkpoint(folder: Path, reference: Path) -> None:
    found, expected = tensors_of(folder), tensors_of(reference)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).exists() == (reference / name).exists()
    assert json.loads((folder / "config.json").read_text()) == json.loads((reference / "config.json").read_text())
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("model", ["qwen", "tied"])
def test_one_process(model, tmp_path):
    made = MODELS[model]()
    made.save_pretrained(tmp_path / "reference")
    export_to_hub(made, tmp_path / "ours")
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "reference")
    assert sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors*")) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "mtp"), [*((name, False) for name in FAMILIES), *((name, True) for name in MTP_FAMILIES)]
)
def test_every_family(name, mtp, tmp_path):
    """From the model, and from a training checkpoint of it."""
    family = FAMILIES[name]
    model = family.ours(init={"mtp_loss_coef": 0.1}, num_nextn_predict_layers=1) if mtp else family.ours()
    model.save_pretrained(tmp_path / "reference")
    export_to_hub(model, tmp_path / "ours")
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "reference")
    with_mtp = {
        tensor for tensor in tensors_of(tmp_path / "ours") if f".layers.{model.config.num_hidden_layers}." in tensor
    }
    assert bool(with_mtp) == mtp
    folder = begin(tmp_path / "checkpoint-1")
    dcp.save(training_state(model, torch.optim.SGD(model.parameters())), checkpoint_id=folder / SHARDS)
    write_configs(model, folder)
    commit(folder, tmp_path / "checkpoint-1", {"step": 1, "resumable": True})
    main(["convert", str(tmp_path / "checkpoint-1"), str(tmp_path / "converted")])
    assert_same_checkpoint(tmp_path / "converted", tmp_path / "reference")


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("export")
    seen = run_on_ranks(f"{SCENARIO}:everything", 4, folder=str(folder))
    for name, build_model in MODELS.items():
        build_model().save_pretrained(folder / name / "reference")
    return folder, seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks(layout, four_ranks):
    folder = four_ranks[0] / "qwen"
    assert_same_checkpoint(folder / layout, folder / "reference")
    index = json.loads((folder / layout / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(path.name for path in (folder / layout).glob("*.safetensors")) == files
    for name, file in index["weight_map"].items():
        with safe_open(folder / layout / file, "pt") as opened:
            assert name in set(opened.keys())
    expected = tensors_of(folder / "reference")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    loaded = AutoModelForCausalLM.from_pretrained(folder / layout)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in tiny_qwen().state_dict().items())


def test_small_and_tied_models(four_ranks):
    folder, _ = four_ranks
    assert_same_checkpoint(folder / "one file", folder / "qwen" / "reference")
    assert [path.name for path in (folder / "one file").glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_checkpoint(folder / "tied" / "fsdp4", folder / "tied" / "reference")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rank_held_a_whole_fused_tensor(layout, four_ranks):
    """Nor more than its own share of one."""
    own_share = FUSED_BYTES // 2 if layout == "replicate2 x ep2" else FUSED_BYTES // 4
    for rank in four_ranks[1]:
        seen = rank["qwen", layout]
        assert 0 < seen["largest"] <= own_share
        assert any("c10d" in operation for operation in seen["operations"]), "the spy saw no collective"


def test_the_spy_sees_a_gathered_tensor(four_ranks):
    """As in transformers' own save."""
    assert max(rank["stock"] for rank in four_ranks[1]) >= FUSED_BYTES


@pytest.mark.parametrize("layout", ["ep4", "efsdp2 x ep2", "fsdp4"])
def test_fused_on_the_hub(layout, four_ranks):
    """GPT-OSS: experts are fused in the file too, and are written one after the other."""
    folder, seen = four_ranks
    found, reference = tensors_of(folder / "gpt_oss" / layout), tensors_of(folder / "gpt_oss" / "reference")
    assert reference["model.layers.0.mlp.experts.gate_up_proj"].nbytes == FUSED_BYTES
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.items())
    assert max(rank["gpt_oss", layout]["largest"] for rank in seen) <= FUSED_BYTES // 4


def test_boxes_across_dimensions(four_ranks):
    """Tensors sharded over two dimensions, evenly and not, fetched by each rank."""
    assert all(all(rank["boxes"]) for rank in four_ranks[1])


def test_bf16_of_fp32_masters(tmp_path):
    """The same bytes as a bf16 model saves; the correction bias stays fp32."""
    tiny_qwen().save_pretrained(tmp_path / "masters")
    AutoModelForCausalLM.from_pretrained(tmp_path / "masters", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "reference"
    )
    export_to_hub(tiny_qwen(), tmp_path / "ours", dtype=torch.bfloat16)
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "reference")
    assert {str(tensor.dtype) for tensor in tensors_of(tmp_path / "ours").values()} == {
        "torch.bfloat16",
        "torch.float32",
    }


def test_a_conversion_that_needs_all_experts_is_an_error(tmp_path, monkeypatch):
    """What cannot be written expert by expert is refused before the first byte."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    class SortedMerge(MergeModulelist):
        @property
        def reverse_op(self):
            raise RuntimeError("needs all experts")

    model = tiny_qwen()
    model._weight_conversions = [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[SortedMerge(0), Concatenate(1)],
        )
    ]
    with pytest.raises(ExportError, match="does not work on this tensor alone: needs all experts"):
        export_to_hub(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestConvert:
    @pytest.fixture
    def checkpoint(self, four_ranks) -> Path:
        """Of four ranks, efsdp 2 x ep 2, after a step."""
        return four_ranks[0] / "checkpoint-1"

    @pytest.fixture(scope="class")
    def reference(self, tmp_path_factory) -> Path:
        model = tiny_qwen()
        step_(model)
        folder = tmp_path_factory.mktemp("reference")
        model.save_pretrained(folder)
        return folder

    def test_one_process(self, checkpoint, reference, tmp_path):
        with Spy() as spy:
            main(["convert", str(checkpoint), str(tmp_path / "out"), "--max-shard-size", "60KB"])
        assert_same_checkpoint(tmp_path / "out", reference)
        assert 0 < spy.largest <= FUSED_BYTES // 4  # a chunk, as a rank of the training job held it
        assert (tmp_path / "out" / "tokenizer_config.json").exists()
        assert not (tmp_path / "out" / "optimizer_groups.pt").exists()

    def test_four_processes(self, four_ranks, reference):
        folder = four_ranks[0] / "converted"
        assert_same_checkpoint(folder, reference)
        assert len(list(folder.glob("*.safetensors"))) > 4

    def test_the_newest_of_a_run(self, checkpoint, tmp_path):
        main(["convert", str(checkpoint.parent), str(tmp_path / "out"), "--dtype", "bfloat16"])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.dtype == torch.bfloat16

    def test_what_lies_beside_the_weights_comes_along(self, tmp_path):
        """Through a run of the trainer: published configurations, remote code, tokenizer and its templates."""
        source = tmp_path / "source"
        tiny_qwen(vocab_size=128).save_pretrained(source)
        config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "configuration_x.X"}}
        (source / "config.json").write_text(json.dumps(config, indent=4))
        (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": 1}')
        (source / "configuration_x.py").write_text("class X: ...")
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
        run = tmp_path / "run"
        make_trainer("MoETrainer", str(source), str(run), tokenizer, save_only_model=False).train()
        main(["convert", str(run / "checkpoint-2"), str(tmp_path / "out"), "--dtype", "float32"])
        for name in ("config.json", "generation_config.json"):
            found = json.loads((tmp_path / "out" / name).read_text())
            assert found == json.loads((source / name).read_text()) | {"pad_token_id": 0}, name
        assert (tmp_path / "out" / "configuration_x.py").read_text() == "class X: ..."
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
        assert not {"checkpoint.json", "training_args.bin", "trainer_state.json"} & {
            path.name for path in (tmp_path / "out").iterdir()
        }
        with pytest.raises(
            IncompleteCheckpointError, match=r"training checkpoint.*`xtuner-hf convert .*checkpoint-2 OUT"
        ):
            AutoModelForCausalLM.from_pretrained(run / "checkpoint-2")

    def test_not_a_checkpoint(self, tmp_path):
        with pytest.raises(SystemExit, match="is no complete training checkpoint"):
            main(["convert", str(tmp_path), str(tmp_path / "out")])
