"""Greedy completions and their log-probabilities from vLLM; runs in the environment that `make engine` builds.

    python vllm_greedy.py request.json answer.json

Request: {"models": {name: folder}, "prompts": [[token ids]], "max_tokens": n}. Answer, under each name: {"tokens": [[n
ids]], "logprobs": [[n]]}. Importing vLLM takes longer than serving a tiny model, so one process serves all of them.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path


def serve(folder: str, prompts: list[list[int]], max_tokens: int) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=len(prompts),
        kv_cache_memory_bytes=2**26,
    )
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=False)
    requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    completions = [result.outputs[0] for result in engine.generate(requests, sampling, use_tqdm=False)]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return {
        "tokens": [list(completion.token_ids) for completion in completions],
        "logprobs": [
            [position[token].logprob for token, position in zip(completion.token_ids, completion.logprobs, strict=True)]
            for completion in completions
        ],
    }


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = {
        name: serve(folder, request["prompts"], request["max_tokens"]) for name, folder in request["models"].items()
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":  # vLLM may start processes that import this file
    main()
