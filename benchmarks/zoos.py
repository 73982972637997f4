"""Public models by collection: name -> (builder, example inputs). Random weights, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from automatic import transformers_automatic
from families import Entry, transformers_more

_SMALL = (
    "test_", "zepto", "atto", "femto", "pico", "nano", "xxtiny", "xxs", "xtiny", "xs", "tiny", "mini", "_s0", "_b0", "_t0",
    "micro", "_t", "small", "_s", "18", "26", "b0", "lite", "base",
)  # fmt: skip


def torchvision_classification() -> Iterator[Entry]:
    """Every classification model of torchvision."""
    from torchvision import models

    for name in models.list_models(models):
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = 299 if name == "inception_v3" else 224
        yield name, lambda name=name, extra=extra: models.get_model(name, weights=None, **extra), torch.rand(1, 3, size, size)


def torchvision_other() -> Iterator[Entry]:
    """Segmentation, detection, video and optical flow."""
    from torchvision import models as tv

    for name in tv.list_models(tv.segmentation):
        yield name, lambda n=name: tv.get_model(n, weights=None, weights_backbone=None), torch.rand(1, 3, 64, 64)
    for name in tv.list_models(tv.detection):
        yield name, lambda n=name: tv.get_model(n, weights=None, weights_backbone=None), [torch.rand(3, 128, 128)]
    for name in tv.list_models(tv.video):
        size = (16, 224) if "mvit" in name or "s3d" in name else (8, 112)
        yield name, lambda n=name: tv.get_model(n, weights=None), torch.rand(1, 3, size[0], size[1], size[1])
    for name in tv.list_models(tv.optical_flow):
        yield name, lambda n=name: tv.get_model(n, weights=None), (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))


def timm_families() -> Iterator[Entry]:
    """One small variant of every family of timm."""
    import timm
    from timm.models import _registry

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(_registry._model_to_module[name], []).append(name)
    for family in sorted(families):
        name = min(families[family], key=lambda n: (next((i for i, k in enumerate(_SMALL) if k in n), 99), len(n)))
        size = timm.create_model(name, pretrained=False).default_cfg["input_size"]
        yield name, lambda n=name: timm.create_model(n, pretrained=False), torch.rand(1, *size)


def transformers_families() -> Iterator[Entry]:
    """The families of Hugging Face that the README names, built small from their config classes."""
    import transformers as hf

    common = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    text = {"input_ids": torch.arange(8)[None] + 4}
    image = {"pixel_values": torch.rand(1, 3, 32, 32)}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {k: v for k, v in common.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
    shared = {"num_key_value_heads": 2}

    def entry(name: str, model: str, config: str, inputs: dict[str, Any], **options: Any) -> Entry:
        return name, lambda: getattr(hf, model)(getattr(hf, config)(**options)), inputs

    yield entry("BERT", "BertForSequenceClassification", "BertConfig", text, **common)
    yield entry("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", text, **common)
    yield entry(
        "DistilBERT", "DistilBertForSequenceClassification", "DistilBertConfig", text,
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
    )  # fmt: skip
    yield entry("GPT-2", "GPT2LMHeadModel", "GPT2Config", text, vocab_size=99, n_embd=32, n_layer=2, n_head=4, **tokens)
    yield entry(
        "OPT", "OPTForCausalLM", "OPTConfig", text,
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
    )  # fmt: skip
    yield entry("LLaMA", "LlamaForCausalLM", "LlamaConfig", text, **common)
    yield entry("LLaMA, grouped queries", "LlamaForCausalLM", "LlamaConfig", text, **common, **shared)
    yield entry("Mistral", "MistralForCausalLM", "MistralConfig", text, **common, **shared)
    yield entry("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", text, **common, **shared)
    yield entry("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", text, **common, **shared, head_dim=8)
    yield entry("Gemma", "GemmaForCausalLM", "GemmaConfig", text, **common, **shared, head_dim=8)
    yield entry("Phi", "PhiForCausalLM", "PhiConfig", text, **common)
    yield entry(
        "T5", "T5ForConditionalGeneration", "T5Config", text | {"decoder_input_ids": torch.arange(8)[None] + 4},
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
    )  # fmt: skip
    yield entry("ViT", "ViTForImageClassification", "ViTConfig", image, **vision)
    yield entry("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", image, **vision)
    yield entry(
        "Swin", "SwinForImageClassification", "SwinConfig", image,
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
    )  # fmt: skip
    yield entry(
        "SegFormer", "SegformerForSemanticSegmentation", "SegformerConfig", {"pixel_values": torch.rand(1, 3, 64, 64)},
        hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32,
    )  # fmt: skip
    yield entry(
        "CLIP", "CLIPModel", "CLIPConfig", text | image,
        text_config=common | {"max_position_embeddings": 16} | tokens, vision_config=vision, projection_dim=32,
    )  # fmt: skip
    yield entry(
        "Whisper", "WhisperForConditionalGeneration", "WhisperConfig",
        {"input_features": torch.rand(1, 16, 100), "decoder_input_ids": torch.arange(8)[None] + 4},
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50, num_mel_bins=16, decoder_start_token_id=1, **tokens,
    )  # fmt: skip
    yield entry(
        "wav2vec2", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", {"input_values": torch.rand(1, 2000)},
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 3,
        conv_kernel=[10, 3, 3], conv_stride=[5, 2, 2], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip


COLLECTIONS: dict[str, Callable[[], Iterator[Entry]]] = {
    "torchvision": torchvision_classification,
    "torchvision-other": torchvision_other,
    "timm": timm_families,
    "transformers": transformers_families,
    "transformers-more": transformers_more,
    "transformers-automatic": transformers_automatic,
}
