"""A stand-in for llama.cpp's server on loopback: a tiny Llama of ours, with its adapter as a GGUF. Not a test module.

What it answers is what the server in the wheel xllamacpp 2026.10.11549 does.
"""

import torch
from gguf import GGUFReader
from vllm_standin import StandIn, drawn

from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.rollout.server.check import logps_of

FIELDS = {
    *("prompt", "n_predict", "seed", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"),
    *("samplers", "logit_bias", "n_probs", "post_sampling_probs", "return_tokens", "cache_prompt", "stream"),
}
NAMES = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


class LlamaStandIn(StandIn):
    """The server.

    Attributes:
        silent: tokens whose log-probs are left out, as of those that end within a character.
    """

    def __init__(self, base, model):
        super().__init__(base, model)
        self.silent, self.adapter, self.room = set(), None, 256

    def begin(self, arguments, devices):
        self.adapter = arguments[arguments.index("--lora") + 1] if "--lora" in arguments else None
        if self.adapter:
            self.read_adapter()
        return super().begin(arguments, devices)

    @torch.no_grad()
    def read_adapter(self):
        """Put a GGUF's tensors into the base's adapter."""
        found = {one.name: torch.from_numpy(one.data.copy()) for one in GGUFReader(self.adapter).tensors}
        heads = {"attn_q": self.base.model.config.num_attention_heads}
        heads["attn_k"] = self.base.model.config.num_key_value_heads
        layers = {name: module for name, module in self.base.peft.named_modules() if hasattr(module, "masters")}
        assert len(found) == 2 * len(layers)
        for name, tensor in found.items():
            _, number, part, _, half = name.split(".")
            layer = layers[f"base_model.model.model.layers.{number}.{NAMES[part]}"]
            a, b = layer.masters(POLICY)
            if half == "lora_b" and part in heads:
                tensor = tensor.view(heads[part], -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            (a if half == "lora_a" else b).copy_(tensor)
        self.base.adapters_changed()

    def answer(self, path, query, body):
        if path == "/props":
            return 200, {"default_generation_settings": {"n_ctx": self.room}, "build_info": "b1-standin"}
        if path == "/lora-adapters":
            return 200, [{"id": 0, "path": self.adapter, "scale": 1.0}] if self.adapter else []
        if path == "/completion":
            return self.complete(body)
        return super().answer(path, query, body) if path in ("/health", "/started") else (404, {"error": {}})

    @torch.no_grad()
    def complete(self, body):
        assert set(body) <= FIELDS, set(body) - FIELDS
        with self.base.role(POLICY if self.adapter else REFERENCE):
            if body["n_probs"] > 1:  # the whole distribution
                every = range(self.base.head.vocabulary)
                logps = [logps_of(self.base, body["prompt"], [token])[0] for token in every]
                top = [{"id": token, "logprob": one} for token, one in zip(every, logps, strict=True)]
                [[sure, _]] = body["logit_bias"]
                told = [{"id": sure, "logprob": logps[sure], "top_logprobs": top}]
                return 200, {"tokens": [sure], "stop_type": "limit", "completion_probabilities": told}
            one = drawn(self.base, asked(body))[0]
            logps = one.logps
            if body["temperature"] not in (0, 1) and not body["post_sampling_probs"]:
                logps = logps_of(self.base, body["prompt"], one.ids)
        key = "prob" if body["post_sampling_probs"] else "logprob"
        told = [
            {"id": token, key: torch.tensor(logp).exp().item() if key == "prob" else logp}
            for token, logp in zip(one.ids, logps, strict=True)
            if token not in self.silent
        ]
        stop = "limit" if one.truncated else "eos"
        return 200, {"tokens": one.ids, "stop_type": stop, "completion_probabilities": told}


def asked(body):
    """Return a request under the names of `vllm_standin.drawn`."""
    own = {key: body[key] for key in ("prompt", "temperature", "top_k", "top_p", "min_p", "seed")}
    own |= {"repetition_penalty": body["repeat_penalty"], "min_tokens": 0, "stop": (), "n": 1}
    return {**own, "max_tokens": body["n_predict"]}
