from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class PackedCollator(DataCollatorForLanguageModeling):
    def torch_call(self, examples):
        import torch

        o = super().torch_call(examples)
        if self.padding_free and self.pad_to_multiple_of:
            n = sum(len(e["input_ids"]) for e in examples)
            T = o["input_ids"].shape[1]
            o["token_mask"] = (torch.arange(T) < n)[None]
        return o
