"""A training script as a user would start it, on a tiny model."""

from __future__ import annotations

from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import HfArgumentParser

from tests.tiny import build, moe_config, uneven_rows
from xtuner_hf import MoETrainer, MoETrainingArguments, Qwen3MoeForCausalLM
from xtuner_hf.data import PackedCollator


def main() -> None:
    (args,) = HfArgumentParser(MoETrainingArguments).parse_args_into_dataclasses()
    args.max_steps, args.save_strategy, args.report_to, args.remove_unused_columns = 1, "no", [], False
    trainer = MoETrainer(
        model=build(Qwen3MoeForCausalLM, moe_config()),
        args=args,
        train_dataset=Dataset.from_list(uneven_rows()),
        data_collator=PackedCollator(pad_token_id=0, padding_free=False),
    )
    trainer.train()
    sharded = sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    if trainer.is_world_process_zero():
        print(f"trained as {trainer.accelerator.distributed_type} with {sharded} sharded parameters")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
