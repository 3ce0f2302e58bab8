"""Hugging Face models from tiny configurations, without any download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.nets.base import OUTPUT, idiom

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


def words(batch: int) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(17, (batch, 6)),
        "attention_mask": torch.ones(batch, 6, dtype=torch.int64),
    }


def pixels(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 8, 8)}


@idiom(
    words,
    {
        "bert.embeddings.word_embeddings": (8, 4),
        "bert.encoder.layer.0.attention.self.query": (8, 4),
        "bert.encoder.layer.0.attention.self.value": (8, 4),
        "bert.encoder.layer.0.intermediate.dense": (12, 6),
        "bert.pooler.dense": (8, 4),
        "classifier": (3, OUTPUT),
    },
)
def hugging_face_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=17, max_position_embeddings=16, num_labels=3, **SMALL)
    )


@idiom(
    words,
    {
        "transformer.wte#1": (17, "looks rows up by number"),
        "transformer.wte#2": (8, 4),
        "transformer.h.0.attn.c_attn#1": (8, 4),
        "transformer.h.0.attn.c_attn#2": (8, 4),
        "transformer.h.0.mlp.c_fc": (32, 16),
    },
)
def hugging_face_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    )


@idiom(
    words,
    {
        "model.embed_tokens": (8, 4),
        "model.layers.0.self_attn.q_proj": (2, 1),
        "model.layers.0.self_attn.v_proj": (4, 2),
        "model.layers.0.mlp.gate_proj": (12, 6),
        "lm_head": (17, OUTPUT),
    },
    masked=False,
)
def hugging_face_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17,
            num_key_value_heads=1,
            max_position_embeddings=16,
            use_cache=False,
            **SMALL,
        )
    )


@idiom(
    pixels,
    {
        "vit.embeddings.patch_embeddings.projection": (8, 4),
        "vit.layers.0.attention.q_proj": (8, 4),
        "vit.layers.0.attention.v_proj": (8, 4),
        "vit.layers.0.mlp.fc1": (12, 6),
        "classifier": (3, OUTPUT),
    },
)
def hugging_face_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL))
