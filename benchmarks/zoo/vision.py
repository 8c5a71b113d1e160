"""Modules for images, of six libraries."""

import torch
from modules import CLASSES, by_pixel
from torch import nn


# vit-pytorch


VIT = {"image_size": 32, "num_classes": CLASSES, "dim": 16, "heads": 2, "mlp_dim": 32}


def vit():
    from vit_pytorch import ViT

    return ViT(patch_size=8, depth=2, dropout=0.1, emb_dropout=0.1, **VIT)


def vit_simple():
    from vit_pytorch import SimpleViT

    return SimpleViT(patch_size=8, depth=2, **VIT)


def vit_deep():
    from vit_pytorch.deepvit import DeepViT

    return DeepViT(patch_size=8, depth=2, dropout=0.1, **VIT)


def vit_cait():
    """Layers are dropped whole, and then get no gradient."""
    from vit_pytorch.cait import CaiT

    return CaiT(patch_size=8, depth=2, cls_depth=1, layer_dropout=0.3, **VIT)


def vit_cct():
    from vit_pytorch.cct import CCT

    sizes = {"img_size": (32, 32), "embedding_dim": 16, "n_conv_layers": 1}
    layers = {"num_layers": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return CCT(**sizes, **layers, num_classes=CLASSES, positional_embedding="sine")


def vit_mobile():
    from vit_pytorch.mobile_vit import MobileViT

    return MobileViT(
        image_size=(64, 64),
        dims=[16, 20, 24],
        channels=[4, 4, 8, 8, 8, 8, 12, 12, 16, 16, 24],
        num_classes=CLASSES,
    )


# timm


def timm(name, **more):
    import timm

    return timm.create_model(name, num_classes=CLASSES, **more)


def timm_resnet():
    return timm("resnet10t")


def timm_mobilenet():
    return timm("mobilenetv3_small_050").to(memory_format=torch.channels_last)


def timm_vit():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
    return timm("vit_tiny_patch16_224", **sizes, num_heads=2, drop_path_rate=0.2)


def timm_convnext():
    return timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


def timm_mixer():
    return timm("gmixer_12_224", img_size=32)


# MONAI


def monai_unet():
    from monai.networks.nets import UNet

    shape = {"in_channels": 3, "out_channels": 2, "channels": (4, 8, 16)}
    return by_pixel(UNet(spatial_dims=2, **shape, strides=(2, 2), dropout=0.1))


def monai_attention_unet():
    from monai.networks.nets import AttentionUnet

    shape = {"in_channels": 3, "out_channels": 2, "channels": (4, 8, 16)}
    return by_pixel(AttentionUnet(spatial_dims=2, **shape, strides=(2, 2)))


def monai_segresnet():
    from monai.networks.nets import SegResNet

    shape = {"in_channels": 3, "out_channels": 2, "init_filters": 8}
    return by_pixel(
        SegResNet(spatial_dims=2, **shape, blocks_down=(1, 1), blocks_up=(1,))
    )


def monai_densenet():
    from monai.networks.nets import DenseNet

    sizes = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}
    shape = {"spatial_dims": 2, "in_channels": 3, "out_channels": CLASSES}
    return DenseNet(**shape, **sizes, dropout_prob=0.1)


# segmentation-models-pytorch


def smp_unet():
    import segmentation_models_pytorch as smp

    sizes = {"encoder_depth": 3, "decoder_channels": (16, 8, 8)}
    return by_pixel(smp.Unet("tu-resnet10t", encoder_weights=None, classes=2, **sizes))


def smp_fpn():
    import segmentation_models_pytorch as smp

    sizes = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}
    return by_pixel(smp.FPN("tu-resnet10t", encoder_weights=None, classes=2, **sizes))


# kornia


def kornia_augmented():
    """Augmentation on the model's side, from torch's generator."""
    import kornia.augmentation as augmentation

    changes = augmentation.AugmentationSequential(
        augmentation.RandomHorizontalFlip(p=0.5),
        augmentation.RandomErasing(p=0.5),
    )
    body = nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES))

    class Augmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.changes, self.body = changes, body

        def forward(self, x):
            return self.body(self.changes(x) if self.training else x)

    return Augmented()
