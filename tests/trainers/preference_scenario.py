"""One short run on preferences with everything about it recorded, and the same losses written down independently."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig

from tests.families import cast
from tests.rl.toy import CHARACTERS, char_tokenizer
from tests.tiny import build, dense_config, moe_config
from tests.trainers.scenario import Recorder, full


def pairs(num_pairs: int = 16, seed: int = 0) -> list[dict]:
    """Pairs of very different lengths, one character a token."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=generator))
        return "".join(CHARACTERS[i] for i in torch.randint(len(CHARACTERS), (length,), generator=generator))

    return [{"prompt": text(2, 9), "chosen": text(1, 14), "rejected": text(1, 14)} for _ in range(num_pairs)]


def expert_lora() -> LoraConfig:
    """Adapters on attention and experts, as PEFT starts them."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets)


def policy(seed: int = 0, dtype: torch.dtype = torch.float64, dense: bool = False):
    import xtuner_hf

    if dense:
        return cast(build(xtuner_hf.Qwen3ForCausalLM, dense_config(), seed=seed), dtype)
    model = cast(build(xtuner_hf.Qwen3MoeForCausalLM, moe_config(), seed=seed), dtype)
    model.set_experts_implementation("xtuner_reference")
    return model


def make_trainer(kind: Any, config_class: Any, folder: str, *, batch: int, accumulation: int, steps: int, **arguments):
    """A trainer of class `kind` with a reference that differs from the policy, and its recorder."""
    given = ("model", "ref_model", "peft_config", "processing_class", "train_dataset")
    keywords = {key: arguments.pop(key) for key in given if key in arguments}
    dense = arguments.pop("dense", False)
    num_rows = arguments.pop("num_rows", 16)
    recorder = Recorder()
    args = config_class(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        bf16=False,
        seed=3,
        **(
            {"save_strategy": "no", "gradient_checkpointing": False, "max_grad_norm": 0.5}
            | {"router_aux_loss_coef": 0.0, "beta": 0.3, "learning_rate": 1e-3, "use_cpu": True}
            | arguments
        ),
    )
    defaults: dict = {"processing_class": char_tokenizer(), "train_dataset": Dataset.from_list(pairs(num_rows))}
    if "model" not in keywords:
        defaults |= {"model": policy(0, dense=dense)}
    if "ref_model" not in keywords:
        defaults |= {"ref_model": policy(1, dense=dense)}
    trainer = kind(**(defaults | keywords), args=args, callbacks=[recorder])
    return trainer, recorder


def run_quickly(trainer: Any, **arguments: Any) -> None:
    """Train without the picture at the end, which takes longer than these runs."""
    with mock.patch("xtuner_hf.trainers.mixin.draw_training"):
        trainer.train(**arguments)


def train(
    kind: str = "MoEDPOTrainer",
    *,
    batch: int = 8,
    accumulation: int = 1,
    steps: int = 2,
    resume_at: int | None = None,
    folder: str | None = None,
    evaluate: bool = False,
    **arguments,
) -> dict:
    """Train on 8 pairs an optimizer step, if batch x ranks x accumulation is; optionally in two runs.

    `folder` is for a resumed run on several processes, which must share it. `evaluate` on 5 other pairs afterwards.
    """
    import xtuner_hf

    classes = getattr(xtuner_hf, kind), getattr(xtuner_hf, kind.replace("Trainer", "Config"))
    shifts = []
    with contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory() as folder:
        runs: list[dict] = [{}]
        if resume_at is not None:
            saving = {"save_strategy": "steps", "save_steps": resume_at}
            runs = [saving | {"steps": resume_at, "lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant"}]
        for index, changes in enumerate(runs):
            settings = {"batch": batch, "accumulation": accumulation, "steps": steps} | arguments | changes
            trainer, recorder = make_trainer(*classes, folder, **settings)
            run_quickly(trainer, resume_from_checkpoint=index > 0)
            shifts += [log.get("rewards/shift") for log in recorder.logs]
        evaluated = trainer.evaluate(Dataset.from_list(pairs(5, seed=1)))["eval_loss"] if evaluate else None
    state = {name: full(tensor) for name, tensor in trainer.model.state_dict().items()}
    return {"logs": recorder.logs, "grads": recorder.grads, "state": state, "shifts": shifts, "evaluated": evaluated}


def train_all(runs: list[dict]) -> list[dict]:
    """Several runs in one set of processes, which take longer to start than to train."""
    return [train(**run) for run in runs]


def reference_layout(ep_size: int) -> dict:
    """How the reference lies: which layers are sharded by themselves, and this rank's experts."""
    from torch.distributed.fsdp import FSDPModule

    from xtuner_hf import MoEDPOConfig, MoEDPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        settings = {"batch": 4, "accumulation": 1, "steps": 1, "ref_model": None, "experts_kernel": "reference"}
        trainer, _ = make_trainer(MoEDPOTrainer, MoEDPOConfig, folder, ep_size=ep_size, **settings)
        trainer.train()
    layers, experts = trainer.ref_model.model.layers, trainer.ref_model.model.layers[0].mlp.experts
    return {
        "sharded": [isinstance(layer, FSDPModule) for layer in layers],
        "experts": tuple(experts.down_proj.to_local().shape),
        "policy_experts": tuple(trainer.model.model.layers[0].mlp.experts.down_proj.to_local().shape),
        "trains": any(parameter.requires_grad for parameter in trainer.ref_model.parameters()),
    }


def answer_logps(model, rows: list[dict], name: str) -> list[torch.Tensor]:
    """Log-probabilities of each answer's tokens, one row at a time, from the full logits of transformers' forward."""
    tokenizer, logps = char_tokenizer(), []
    for row in rows:
        answer = tokenizer(row[name] + "<eos>")["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] + answer])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        token_logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        logps.append(token_logps[-len(answer) :])
    return logps


def reference_losses(model, ref_model, rows: list[dict], beta: float, shift: float) -> dict[str, torch.Tensor]:
    """The terms of MPO over all rows: DPO eq. 7, BCO and likelihood as in arXiv 2411.10442, eq. 3-8."""
    chosen, rejected = answer_logps(model, rows, "chosen"), answer_logps(model, rows, "rejected")
    with torch.no_grad():
        ref_chosen = answer_logps(ref_model, rows, "chosen")
        ref_rejected = answer_logps(ref_model, rows, "rejected")
    total = {"sigmoid": 0.0, "bco_pair": 0.0, "token": 0.0, "sequence": 0.0, "rewards": 0.0}
    num_tokens = sum(len(logps) for logps in chosen)
    for c, r, rc, rr in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):
        reward_c, reward_r = beta * (c.sum() - rc.sum()), beta * (r.sum() - rr.sum())
        total["sigmoid"] = total["sigmoid"] - F.logsigmoid(reward_c - reward_r) / len(rows)
        bco = -F.logsigmoid(reward_c - shift) - F.logsigmoid(-(reward_r - shift))
        total["bco_pair"] = total["bco_pair"] + bco / len(rows)
        total["token"] = total["token"] - c.sum() / num_tokens
        total["sequence"] = total["sequence"] - c.mean() / len(rows)
        total["rewards"] = total["rewards"] + (reward_c + reward_r).detach() / (2 * len(rows))
    return total
