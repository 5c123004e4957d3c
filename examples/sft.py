"""Supervised fine-tuning of a Qwen3 or Qwen3-MoE on conversations.

    accelerate launch --config_file accelerate_configs/gpu_8.yaml examples/sft.py \
        --model Qwen/Qwen3-30B-A3B --train_file conversations.jsonl --output_dir out --bf16 --ep_size 8

With `--config model_config.json --tokenizer folder` in place of `--model`, a model with random weights is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, set_seed

from xtuner_hf import AutoModelForCausalLM, MoESFTConfig, MoESFTTrainer
from xtuner_hf.data import load_conversations


@dataclass
class ScriptArguments:
    """What to train, on what."""

    train_file: str = field(metadata={"help": "jsonl of conversations: {'messages': [{'role', 'content'}, ...]}"})
    eval_file: str | None = field(default=None, metadata={"help": "The same, held out."})
    model: str | None = field(default=None, metadata={"help": "Checkpoint: a folder or a name on the Hub."})
    config: str | None = field(default=None, metadata={"help": "config.json of a model to start from random weights."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the checkpoint's own."})
    on_bad_row: str = field(default="error", metadata={"help": "'error' or 'skip' (and count) malformed rows."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, MoESFTConfig)).parse_args_into_dataclasses()
    if (script.model is None) == (script.config is None):
        raise SystemExit("Give either --model (a checkpoint) or --config (random weights).")
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer or script.model)
    model = script.model or AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(script.config))
    eval_dataset = load_conversations(script.eval_file, on_bad_row=script.on_bad_row) if script.eval_file else None
    trainer = MoESFTTrainer(
        model=model,
        args=args,
        train_dataset=load_conversations(script.train_file, on_bad_row=script.on_bad_row),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model()


if __name__ == "__main__":
    main()
