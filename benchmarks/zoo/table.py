"""All modules: their library, how they are built, and what they learn from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One module."""

    library: str
    build: str
    data: str
    loss: str = ""
    """By default that of the task."""


def _entries(library: str, data: str, *builds: str) -> dict[str, Entry]:
    return {name.partition(":")[2]: Entry(library, name, data) for name in builds}


ZOO: dict[str, Entry] = {
    **_entries(
        "transformers",
        "text",
        "hugging:hf_gpt2",
        "hugging:hf_gpt2_checkpointing",
        "hugging:hf_gpt2_reentrant",
        "hugging:hf_llama",
        "hugging:hf_llama_dynamic",
        "hugging:hf_mixtral",
        "hugging:hf_gpt_neox",
        "hugging:hf_mamba",
        "hugging:hf_t5",
        "hugging:hf_bart",
    ),
    **_entries(
        "transformers",
        "sentences",
        "hugging:hf_bert",
        "hugging:hf_albert",
        "hugging:hf_distilbert",
    ),
    **_entries(
        "transformers",
        "images",
        "hugging:hf_vit",
        "hugging:hf_swin",
        "hugging:hf_convnext",
    ),
    **_entries("transformers", "sound", "hugging:hf_wav2vec2"),
    **_entries(
        "peft",
        "text",
        "hugging:peft_lora",
        "hugging:peft_lora_bfloat16",
        "hugging:peft_ia3",
    ),
    **_entries("x-transformers", "text", "more:xt_decoder", "more:xt_layer_dropout"),
    **_entries("x-transformers", "images", "more:xt_vit"),
    **_entries(
        "vit-pytorch",
        "images",
        "vision:vit",
        "vision:vit_simple",
        "vision:vit_deep",
        "vision:vit_cait",
        "vision:vit_cct",
    ),
    **_entries("vit-pytorch", "large_images", "vision:vit_mobile"),
    **_entries(
        "timm",
        "images",
        "vision:timm_resnet",
        "vision:timm_mobilenet",
        "vision:timm_vit",
        "vision:timm_convnext",
        "vision:timm_mixer",
    ),
    **_entries(
        "monai",
        "pixels",
        "vision:monai_unet",
        "vision:monai_attention_unet",
        "vision:monai_segresnet",
    ),
    **_entries("monai", "images", "vision:monai_densenet"),
    **_entries(
        "segmentation-models-pytorch", "pixels", "vision:smp_unet", "vision:smp_fpn"
    ),
    **_entries(
        "torch-geometric",
        "series",
        "more:pyg_gcn",
        "more:pyg_gat",
        "more:pyg_sage",
        "more:pyg_gin",
    ),
    **_entries(
        "rtdl-revisiting-models",
        "table",
        "more:rtdl_mlp",
        "more:rtdl_resnet",
        "more:rtdl_ft_transformer",
    ),
    **_entries("pytorch-tabnet", "table", "more:tabnet"),
    **_entries(
        "vector-quantize-pytorch",
        "itself",
        "more:vq_ema",
        "more:vq_kmeans",
        "more:vq_residual",
        "more:vq_fsq",
    ),
    **_entries("snntorch", "table", "more:snn_leaky"),
    "normflows_real_nvp": Entry(
        "normflows", "more:normflows_real_nvp", "values", "more:density_loss"
    ),
    **_entries("kornia", "small_images", "vision:kornia_augmented"),
    **_entries("performer-pytorch", "text", "more:performer"),
    **_entries("local-attention", "text", "more:local_attention"),
    **_entries("mambapy", "text", "more:mambapy"),
    **_entries("torch", "series", "more:gru", "more:lstm", "more:transformer"),
    **_entries("torch", "itself", "more:Variational"),
    **_entries("torch", "sentences", "more:bags", "more:sparse_bags"),
    **_entries("torch", "table", "more:normed"),
    **_entries("torch", "values", "more:Forces"),
}
