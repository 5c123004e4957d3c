"""Engines that sample: one contract (contract.py), in this process (local.py) or behind HTTP (vllm, sglang, lmdeploy).

Imports nothing: vllm_worker.py is loaded inside vLLM, which has neither transformers' trainers nor TRL at hand.
"""
