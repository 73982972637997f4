"""Every family of transformers that can be built small from sizes that go by the names their settings have."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from families import Entry
from torch import nn

LARGEST = 8_000_000
"""Parameters beyond which a model counts as one whose size is called otherwise."""

# a size, and what families call it
_NAMES = {
    99: "vocab_size",
    64: """max_position_embeddings intermediate_size intermediate_size_mlp n_inner d_inner d_ff ffn_dim encoder_ffn_dim
        decoder_ffn_dim hidden_dim mlp_dim""",
    32: "hidden_size d_model n_embd emb_dim embed_dim dim shared_expert_intermediate_size image_size",
    16: "moe_intermediate_size expert_intermediate_size embedding_size q_lora_rank kv_lora_rank qk_head_dim",
    8: """head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim window_size
        sliding_window patch_size""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads linear_num_value_heads
        num_local_experts num_experts n_routed_experts moe_num_experts rotary_dim state_size conv_kernel""",
    3: "num_channels",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads linear_num_key_heads
        num_experts_per_tok moe_k eos_token_id""",
    1: "bos_token_id n_group topk_group n_shared_experts first_k_dense_replace",
    0: "pad_token_id",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
    {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    {"attention_types": [[["global", "local"], 1]]},
    {"is_decoder": True},
    {"num_hidden_layers": 3},
    {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    {"num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 4},
)  # fmt: skip
"""What some families ask for beside; the first that builds and runs is taken."""


def small(config: type, variant: dict[str, Any]) -> Any:
    """Settings with every size that the class knows by name; the same for the settings inside."""
    known = set(inspect.signature(config.__init__).parameters) | set(getattr(config, "__annotations__", {}))  # type: ignore[misc]
    if not set(variant) <= known:
        raise KeyError("no such setting")
    inside = {name: small(kind, {}) for name, kind in getattr(config, "sub_configs", {}).items() if inspect.isclass(kind)}
    return config(**{name: n for name, n in SIZES.items() if name in known} | inside | variant)


def _built(model: Any, variant: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return model(small(model.config_class, variant)).eval()


def _variant(model: Any, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The first variant that can be built in this size and runs; None where there is none."""
    for variant in VARIANTS:
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in _built(model, variant).parameters())
            if size > LARGEST:
                continue
            with torch.no_grad():
                _built(model, variant)(**inputs)
        except Exception:  # whatever another's constructor makes of sizes it was not meant for
            continue
        return variant
    return None


def transformers_automatic() -> Iterator[Entry]:
    """Name, constructor and inputs of language models (causal, masked, sequence to sequence) and of image classifiers."""
    import transformers as hf
    from transformers.models.auto import modeling_auto as auto

    hf.logging.set_verbosity_error()
    text = {"input_ids": torch.arange(8)[None] + 4}
    kinds = {
        "causal": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, text),
        "masked": (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, text),
        "sequences": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, text | {"decoder_input_ids": text["input_ids"]}),
        "images": (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, {"pixel_values": torch.rand(1, 3, 32, 32)}),
    }
    others = []
    for kind, (names, inputs) in kinds.items():
        for family, name in names.items():
            model = getattr(hf, name if isinstance(name, str) else name[0])
            variant = _variant(model, inputs)
            if variant is None:
                others.append(f"{kind} {family}")
            else:
                yield f"{kind} {family}", functools.partial(_built, model, variant), inputs
    print(f"{len(others)} cannot be built so: {', '.join(others)}", file=sys.stderr, flush=True)
