"""Further families of transformers, built small from their config classes, beside those in ``zoos``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Entry = tuple[str, Callable[[], nn.Module], Any]

_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def transformers_more() -> Iterator[Entry]:
    """Name, constructor and inputs."""
    import transformers as hf

    common = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    vision = {k: v for k, v in common.items() if k != "vocab_size"} | dict(image_size=32, patch_size=8)
    tokens, grouped = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2), dict(num_key_value_heads=2)
    sizes = {"d_model": 32} | {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in _SIDE.items()}
    both = {"vocab_size": 99} | sizes
    stages: dict[str, Any] = dict(hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1])
    text = {"input_ids": torch.arange(8)[None] + 4}
    image, large = {"pixel_values": torch.rand(1, 3, 32, 32)}, {"pixel_values": torch.rand(1, 3, 64, 64)}
    dec = text | {"decoder_input_ids": torch.arange(8)[None] + 4}

    def entry(name: str, model: str, config: str, inputs: dict[str, Any], **options: Any) -> Entry:
        return name, lambda: getattr(hf, model)(getattr(hf, config)(**options)), inputs

    yield entry("Albert", "AlbertForSequenceClassification", "AlbertConfig", text, **common, embedding_size=16)
    yield entry("Bart", "BartForConditionalGeneration", "BartConfig", dec, **both)
    yield entry("MBart", "MBartForConditionalGeneration", "MBartConfig", dec, **both)
    yield entry("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", text, **common)
    yield entry(
        "GPT-Neo", "GPTNeoForCausalLM", "GPTNeoConfig", text, vocab_size=99, hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], intermediate_size=64,
    )  # fmt: skip
    yield entry("GPT-J", "GPTJForCausalLM", "GPTJConfig", text, vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    yield entry(
        "Falcon", "FalconForCausalLM", "FalconConfig", text, vocab_size=99, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    yield entry(
        "Falcon, grouped queries", "FalconForCausalLM", "FalconConfig", text, vocab_size=99, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=True, num_kv_heads=2,
    )  # fmt: skip
    yield entry("Bloom", "BloomForCausalLM", "BloomConfig", text, vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    yield entry("Mpt", "MptForCausalLM", "MptConfig", text, vocab_size=99, d_model=32, n_layers=2, n_heads=4)
    yield entry(
        "Mamba", "MambaForCausalLM", "MambaConfig", text, vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4,
    )  # fmt: skip
    yield entry(
        "Mamba2", "Mamba2ForCausalLM", "Mamba2Config", text, vocab_size=99, hidden_size=32, num_hidden_layers=2,
        state_size=4, num_heads=8, head_dim=8, n_groups=2, expand=2, chunk_size=4,
    )  # fmt: skip
    yield entry("Electra", "ElectraForSequenceClassification", "ElectraConfig", text, **common, embedding_size=16)
    yield entry(
        "DebertaV2", "DebertaV2ForSequenceClassification", "DebertaV2Config", text, **common, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8,
    )  # fmt: skip
    yield entry(
        "XLNet", "XLNetForSequenceClassification", "XLNetConfig", text, vocab_size=99, d_model=32, n_layer=2, n_head=4,
        d_inner=64,
    )  # fmt: skip
    yield entry("Mixtral", "MixtralForCausalLM", "MixtralConfig", text, **common, **grouped, num_local_experts=4)
    yield entry("Phi3", "Phi3ForCausalLM", "Phi3Config", text, **common, **grouped, pad_token_id=0)
    yield entry("Gemma2", "Gemma2ForCausalLM", "Gemma2Config", text, **common, **grouped, head_dim=8)
    yield entry("Gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", text, **common, **grouped, head_dim=8)
    yield entry("Olmo2", "Olmo2ForCausalLM", "Olmo2Config", text, **common, **grouped)
    yield entry("Cohere", "CohereForCausalLM", "CohereConfig", text, **common, **grouped)
    yield entry("StableLm", "StableLmForCausalLM", "StableLmConfig", text, **common, **grouped)
    yield entry("Granite", "GraniteForCausalLM", "GraniteConfig", text, **common, **grouped)
    yield entry("Glm", "GlmForCausalLM", "GlmConfig", text, **common, **grouped, head_dim=8, pad_token_id=0)
    yield entry("Pegasus", "PegasusForConditionalGeneration", "PegasusConfig", dec, **both)
    yield entry(
        "ModernBert", "ModernBertForSequenceClassification", "ModernBertConfig", text, **common, **tokens, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    yield entry("MPNet", "MPNetForSequenceClassification", "MPNetConfig", text, **common)
    yield entry(
        "FNet", "FNetForSequenceClassification", "FNetConfig", text, vocab_size=99, hidden_size=32, num_hidden_layers=2,
        intermediate_size=64,
    )  # fmt: skip
    yield entry("ConvNext", "ConvNextForImageClassification", "ConvNextConfig", large, **stages)
    yield entry("ConvNextV2", "ConvNextV2ForImageClassification", "ConvNextV2Config", large, **stages)
    yield entry("ResNet", "ResNetForImageClassification", "ResNetConfig", large, embedding_size=16, **stages)
    yield entry(
        "RegNet", "RegNetForImageClassification", "RegNetConfig", large, embedding_size=16, hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1], groups_width=8,
    )  # fmt: skip
    yield entry("Beit", "BeitForImageClassification", "BeitConfig", image, **vision)
    yield entry("DeiT", "DeiTForImageClassification", "DeiTConfig", image, **vision)
    yield entry(
        "Swinv2", "Swinv2ForImageClassification", "Swinv2Config", image, image_size=32, patch_size=2, embed_dim=16,
        depths=[2, 2], num_heads=[2, 4], window_size=4,
    )  # fmt: skip
    yield entry(
        "Pvt", "PvtForImageClassification", "PvtConfig", large, image_size=64, hidden_sizes=[16, 32, 32, 32],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
    )  # fmt: skip
    yield entry(
        "PvtV2", "PvtV2ForImageClassification", "PvtV2Config", large, image_size=64, hidden_sizes=[16, 32, 32, 32],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
    )  # fmt: skip
    yield entry(
        "MobileViT", "MobileViTForImageClassification", "MobileViTConfig", large, image_size=64, hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 40], num_attention_heads=4,
    )  # fmt: skip
    yield entry("MobileNetV2", "MobileNetV2ForImageClassification", "MobileNetV2Config", large, image_size=64)
    yield entry(
        "EfficientNet", "EfficientNetForImageClassification", "EfficientNetConfig", large, image_size=64,
        width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320,
    )  # fmt: skip
    yield entry(
        "Pool", "PoolFormerForImageClassification", "PoolFormerConfig", large, hidden_sizes=[16, 32, 32, 40],
        depths=[1, 1, 1, 1],
    )  # fmt: skip
    yield entry("SiglipVision", "SiglipVisionModel", "SiglipVisionConfig", image, **vision)
    yield entry("BlipVision", "BlipVisionModel", "BlipVisionConfig", image, **vision)
    yield entry(
        "Yolos", "YolosForObjectDetection", "YolosConfig", {"pixel_values": torch.rand(1, 3, 32, 32)},
        **vision | dict(image_size=[32, 32]), num_detection_tokens=4,
    )  # fmt: skip
    yield entry(
        "Detr", "DetrForObjectDetection", "DetrConfig", large, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None,
        backbone_config=hf.ResNetConfig(embedding_size=16, **stages, out_features=["stage4"]),
        **sizes, num_queries=5,
    )  # fmt: skip
    yield entry(
        "Hubert", "HubertForSequenceClassification", "HubertConfig", {"input_values": torch.rand(1, 2000)}, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 3, conv_kernel=[10, 3, 3],
        conv_stride=[5, 2, 2], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    yield entry(
        "AST", "ASTForAudioClassification", "ASTConfig", {"input_values": torch.rand(1, 32, 16)},
        **{k: v for k, v in common.items() if k != "vocab_size"}, patch_size=8, frequency_stride=8, time_stride=8,
        max_length=32, num_mel_bins=16,
    )  # fmt: skip
    yield entry(
        "Timesformer", "TimesformerForVideoClassification", "TimesformerConfig",
        {"pixel_values": torch.rand(1, 2, 3, 32, 32)}, **vision, num_frames=2,
    )  # fmt: skip
    yield entry(
        "VideoMAE", "VideoMAEForVideoClassification", "VideoMAEConfig", {"pixel_values": torch.rand(1, 4, 3, 32, 32)},
        **vision, num_frames=4,
    )  # fmt: skip
    yield entry(
        "UperNet", "UperNetForSemanticSegmentation", "UperNetConfig", large,
        backbone_config=hf.ConvNextConfig(**stages, out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_size=32, pool_scales=[1, 2], auxiliary_in_channels=32, num_labels=5,
    )  # fmt: skip
    yield entry("LayoutLM", "LayoutLMForSequenceClassification", "LayoutLMConfig", text, **common)
    yield entry(
        "Canine", "CanineForSequenceClassification", "CanineConfig", text,
        **{k: v for k, v in common.items() if k != "vocab_size"}, downsampling_rate=2, local_transformer_stride=4,
        upsampling_kernel_size=2,
    )  # fmt: skip
    yield entry(
        "Funnel", "FunnelForSequenceClassification", "FunnelConfig", text, vocab_size=99, block_sizes=[1, 1], d_model=32,
        n_head=4, d_head=8, d_inner=64,
    )  # fmt: skip
    yield entry(
        "Qwen2Moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", text, **common, **grouped, num_experts=4,
        moe_intermediate_size=16, shared_expert_intermediate_size=32,
    )  # fmt: skip
    yield entry(
        "Speech2Text", "Speech2TextForConditionalGeneration", "Speech2TextConfig",
        {"input_features": torch.rand(1, 20, 16), "decoder_input_ids": torch.arange(8)[None] + 4}, **both, conv_channels=32,
        input_feat_per_channel=16,
    )  # fmt: skip
