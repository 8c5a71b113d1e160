"""Modules of transformers and peft."""

from modules import CLASSES, TOKENS, Call, Logits, Through
from torch import nn


# Hugging Face's transformers


SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LLAMA = {**SIZES, "num_key_value_heads": 1}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}


def gpt2(**more):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=TOKENS, use_cache=False, **sizes, **more)
    return GPT2LMHeadModel(config)


def hf_gpt2():
    return Logits(gpt2())


def hf_gpt2_checkpointing(use_reentrant=False):
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return Logits(model)


def hf_gpt2_reentrant():
    return hf_gpt2_checkpointing(use_reentrant=True)


def hf_llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    return Logits(LlamaForCausalLM(LlamaConfig(**(LLAMA | more))), use_cache=False)


def hf_llama_dynamic():
    """Rotary frequencies that change with the longest input so far."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    return hf_llama(rope_parameters=rope, max_position_embeddings=8)


def hf_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 1}
    return Logits(MixtralForCausalLM(MixtralConfig(**LLAMA, **experts)))


def hf_gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return Logits(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), use_cache=False)


def hf_mamba():
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return Logits(MambaForCausalLM(MambaConfig(vocab_size=TOKENS, **sizes)))


def hf_bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**(SIZES | {"pad_token_id": 0}), num_labels=CLASSES)
    return Logits(BertForSequenceClassification(config))


def hf_albert():
    """One layer's weights for all layers."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = SIZES | {"pad_token_id": 0, "embedding_size": 8}
    config = AlbertConfig(**sizes, num_labels=CLASSES)
    return Logits(AlbertForSequenceClassification(config))


def hf_distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    config = DistilBertConfig(vocab_size=TOKENS, **sizes, num_labels=CLASSES)
    return Logits(DistilBertForSequenceClassification(config))


class Copying(nn.Module):
    """An encoder and decoder that get the same tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x, decoder_input_ids=x, use_cache=False).logits


def hf_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return Copying(T5ForConditionalGeneration(T5Config(vocab_size=TOKENS, **sizes)))


def hf_bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "max_position_embeddings": 64, "vocab_size": TOKENS}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_ffn_dim": 32}
        sizes |= {f"{part}_attention_heads": 2}
    return Copying(BartForConditionalGeneration(BartConfig(**sizes)))


def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig(**VISION)))


def hf_swin():
    """With stochastic depth."""
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 2}
    depths = {"depths": [1, 1], "num_heads": [1, 2], "num_labels": CLASSES}
    return Logits(SwinForImageClassification(SwinConfig(**sizes, **depths)))


def hf_convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    config = ConvNextConfig(**sizes, num_labels=CLASSES, drop_path_rate=0.1)
    return Logits(ConvNextForImageClassification(config))


def hf_wav2vec2():
    """Layers are dropped whole, and then get no gradient; masks come from numpy."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    sizes = SIZES | {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
    sizes |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
    sizes |= {"num_conv_pos_embedding_groups": 2, "pad_token_id": 0}
    config = Wav2Vec2Config(
        **sizes, num_labels=CLASSES, layerdrop=0.5, classifier_proj_size=8
    )
    return Logits(Wav2Vec2ForSequenceClassification(config))


# peft


def peft_lora():
    from peft import LoraConfig, get_peft_model

    return Logits(
        get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"])).base_model
    )


def peft_lora_bfloat16():
    """Adapters in float32 on a frozen model in bfloat16."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        gpt2().bfloat16(),
        LoraConfig(r=2, target_modules=["c_attn"]),
        autocast_adapter_dtype=True,
    )
    return Through(Logits(model.base_model), after=Call(lambda y: y.float()))


def peft_ia3():
    from peft import IA3Config, get_peft_model

    parts = {"target_modules": ["c_attn", "mlp.c_proj"]}
    config = IA3Config(**parts, feedforward_modules=["mlp.c_proj"])
    return Logits(get_peft_model(gpt2(), config).base_model)
