"""Multi-token prediction as an argument of the trainers: SFT trains it as the paper says, others refuse it."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import xtuner_hf
from tests.families import FAMILIES
from tests.models.test_mtp import compare, model_with_mtp, written_out
from tests.ranks import run_on_ranks
from tests.tiny import uneven_rows
from tests.trainers.scenario import differences, tiny_tokenizer, train
from xtuner_hf.data import PackedCollator

ROWS = uneven_rows(4)


def trainer(kind: str, model, folder, **arguments):
    is_sft = kind == "MoESFT"
    defaults = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "router_sequence_loss_coef": 0.0,
        "router_bias_update_rate": 0.0,
        **({"dataset_kwargs": {"skip_prepare_dataset": True}} if is_sft else {}),
    }
    config = xtuner_hf.MoESFTConfig if is_sft else xtuner_hf.MoETrainingArguments
    return getattr(xtuner_hf, f"{kind}Trainer")(
        model=model,
        args=config(**(defaults | arguments)),
        data_collator=PackedCollator(pad_token_id=0, padding_free=True),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize(("name", "depths"), [("deepseek_v3", 1), ("deepseek_v3", 2), ("glm4_moe", 1)])
def test_sft_of_packed_rows_is_the_paper_s(name, depths, tmp_path):
    """Through TRL's fused head: loss and all gradients against the paper, one document at a time."""
    model = model_with_mtp(name, coef=0.0, depths=depths)
    made = trainer("MoESFT", model, tmp_path, mtp_loss_coef=0.3, experts_kernel="reference")
    assert made.model is model
    assert model.mtp_loss_coef == 0.3
    documents = [torch.tensor([row["input_ids"]]) for row in ROWS]
    labels = [torch.tensor([row["labels"]]) for row in ROWS]
    num_labels = sum(int((label[:, 1:] != -100).sum()) for label in labels)
    expected = written_out(name, model, documents, labels) / num_labels
    grads = torch.autograd.grad(expected, list(model.parameters()))
    expected_grads = dict(zip(dict(model.named_parameters()), grads, strict=True))
    batch = made.data_collator(ROWS)
    loss = made.compute_loss(model.train(), batch, num_items_in_batch=num_labels)
    loss.backward()
    compare(loss.item(), expected.item(), {n: p.grad for n, p in model.named_parameters()}, expected_grads)
    plain = made.compute_loss(model.eval(), batch, num_items_in_batch=num_labels)
    assert plain < loss - 0.1, "evaluation scores the next token alone"


def test_the_mean_over_ranks_of_each_ranks_mean():
    """`average_tokens_across_devices=False`: SFT adds its own share, and must divide it as transformers does the rest;
    also where two ranks share sequences, which then have one mean."""
    run = {"family": "deepseek_v3", "config": {"num_nextn_predict_layers": 1}, "init": {"mtp_loss_coef": 0.3}}
    run |= {"average_tokens_across_devices": False, "packed": True, "steps": 1, "experts_kernel": "reference"}
    splits = [{"batch": 4}, {"batch": 8, "sp_size": 2}]
    runs = [run | split | {"trainer_kind": kind} for split in splits for kind in ("MoETrainer", "MoESFTTrainer")]
    of_ranks, sft_of_ranks, shared, sft_shared = run_on_ranks("tests.trainers.scenario:train_each", 2, runs=runs)[0]
    assert max(differences(sft_of_ranks, of_ranks).values()) < 1e-6
    assert max(differences(sft_shared, shared).values()) < 1e-6
    one_mean = train(**run | {"batch": 8})
    assert max(differences(shared, one_mean).values()) < 1e-6
    assert differences(of_ranks, one_mean)["loss"] > 1e-4, "the mean of means is another number"


@pytest.mark.parametrize("kind", ["MoE", "MoESFT"])
def test_a_model_by_name(kind, tmp_path):
    """None leaves the layers out, 0 keeps them bit for bit, more trains them."""
    hub = tmp_path / "hub"
    model_with_mtp(dtype=torch.float32).save_pretrained(hub)
    before = load_file(hub / "model.safetensors")
    name = "model.layers.3.eh_proj.weight"
    for coef in (None, 0.0, 0.3):
        folder = tmp_path / str(coef)
        made = trainer(kind, str(hub), folder, mtp_loss_coef=coef, max_steps=1, save_strategy="no")
        made.train()
        made.save_model(str(folder / "saved"))
        after = load_file(folder / "saved" / "model.safetensors")
        assert (name in after) == (coef is not None)
        assert coef is None or torch.equal(after[name], before[name]) == (coef == 0)


def test_refused_in_one_sentence(tmp_path):
    plain = FAMILIES["qwen3_moe"].ours()
    plain.save_pretrained(tmp_path / "plain")
    for model in (plain, str(tmp_path / "plain")):
        with pytest.raises(ValueError, match=r"is 0\.3, but qwen3_moe has no multi-token prediction layers"):
            trainer("MoE", model, tmp_path, mtp_loss_coef=0.3)
    with pytest.raises(ValueError, match=r"is 0\.3 and the model has 0 multi-token prediction layers"):
        trainer("MoE", FAMILIES["deepseek_v3"].ours(), tmp_path, mtp_loss_coef=0.3)
    with pytest.raises(ValueError, match=r"mtp_loss_coef is -1; it must be 0 \(off\) or positive"):
        xtuner_hf.MoETrainingArguments(mtp_loss_coef=-1)
    for arguments in ({"loss_type": "dft"}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(ValueError, match="the loss of further tokens is the plain cross entropy: drop loss_type"):
            trainer("MoESFT", model_with_mtp(dtype=torch.float32), tmp_path, **arguments)


@pytest.mark.parametrize("kind", ["MoEDPO", "MoEMPO", "MoEGRPO", "MoEDAPO"])
def test_trainers_on_whole_answers_refuse_it(kind, tmp_path):
    model = model_with_mtp(dtype=torch.float32)
    args = getattr(xtuner_hf, f"{kind}Config")(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    rewards = {"reward_funcs": len} if kind in ("MoEGRPO", "MoEDAPO") else {}
    with pytest.raises(ValueError, match=rf"is 0\.3, but {kind}Config trains on whole answers, whose preference or"):
        getattr(xtuner_hf, f"{kind}Trainer")(model=model, args=args, **rewards)
