"""Hugging Face models from tiny configurations, without any download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.nets.base import OUTPUT, idiom

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def words(batch: int) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(17, (batch, 6)),
        "attention_mask": torch.ones(batch, 6, dtype=torch.int64),
    }


def pixels(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 8, 8)}


@idiom(words, {})
def hugging_face_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(17, max_position_embeddings=16, num_labels=3, **SMALL))


@idiom(words, {})
def hugging_face_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(17, 16, 8, 1, 2, use_cache=False))


@idiom(words, {}, masked=False)
def hugging_face_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(17, num_key_value_heads=1, max_position_embeddings=16, use_cache=False, **SMALL)
    )


@idiom(pixels, {})
def hugging_face_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL))
