"""Greedy completions and their log-probabilities from vLLM; runs in the environment that `make engine` builds.

    python vllm_greedy.py request.json answer.json

Request: {"model": folder, "prompts": [[token ids]], "max_tokens": n}. Answer: {"tokens": [[n ids]], "logprobs": [[n]]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    request = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=len(request["prompts"]),
        kv_cache_memory_bytes=2**26,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, logprobs=0, detokenize=False
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]]
    completions = [result.outputs[0] for result in engine.generate(prompts, sampling, use_tqdm=False)]
    answer = {
        "tokens": [list(completion.token_ids) for completion in completions],
        "logprobs": [
            [position[token].logprob for token, position in zip(completion.token_ids, completion.logprobs, strict=True)]
            for completion in completions
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":  # vLLM may start processes that import this file
    main()
