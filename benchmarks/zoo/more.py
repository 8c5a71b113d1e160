"""Modules for graphs, tables, codebooks, spikes, densities and text."""

import torch
from modules import CLASSES, LENGTH, TOKENS, Through, first
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm


# x-transformers


def xt_decoder():
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=2, heads=2, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=TOKENS, max_seq_len=64, attn_layers=layers)


def xt_layer_dropout():
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=2, heads=2, layer_dropout=0.3, attn_dropout=0.1)
    return TransformerWrapper(num_tokens=TOKENS, max_seq_len=64, attn_layers=layers)


def xt_vit():
    from x_transformers import Encoder, ViTransformerWrapper

    sizes = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES}
    return ViTransformerWrapper(**sizes, attn_layers=Encoder(dim=16, depth=2, heads=2))


# PyTorch Geometric, on graphs of one size: a sample is a graph of its features


def ring(size):
    """The edges of a ring, both ways."""
    start = torch.arange(size)
    ahead = torch.stack([start, (start + 1) % size])
    return torch.cat([ahead, ahead.flip(0)], 1)


class Graphs(nn.Module):
    """[b, nodes, features] -> logits of each graph."""

    def __init__(self, one, two):
        super().__init__()
        self.one, self.two, self.head = one, two, nn.Linear(16, CLASSES)

    def forward(self, x):
        b, nodes, _ = x.shape
        starts = torch.arange(b).repeat_interleave(2 * nodes) * nodes
        edges = ring(nodes).repeat(1, b) + starts
        h = self.one(x.flatten(0, 1), edges).relu()
        h = self.two(functional.dropout(h, 0.2, self.training), edges)
        return self.head(h.view(b, nodes, -1).mean(1))


def pyg_gcn():
    from torch_geometric.nn import GCNConv

    return Graphs(GCNConv(4, 16), GCNConv(16, 16))


def pyg_gat():
    from torch_geometric.nn import GATConv

    return Graphs(GATConv(4, 8, heads=2, dropout=0.1), GATConv(16, 16))


def pyg_sage():
    from torch_geometric.nn import SAGEConv

    return Graphs(SAGEConv(4, 16), SAGEConv(16, 16, aggr="max"))


def pyg_gin():
    from torch_geometric.nn import GINConv
    from torch_geometric.nn.models import MLP

    return Graphs(
        GINConv(MLP([4, 16, 16]), train_eps=True),
        GINConv(MLP([16, 16, 16])),
    )


# Tables


def rtdl_mlp():
    from rtdl_revisiting_models import MLP

    return MLP(d_in=8, d_out=CLASSES, n_blocks=2, d_block=16, dropout=0.1)


def rtdl_resnet():
    from rtdl_revisiting_models import ResNet

    sizes = {"d_in": 8, "d_out": CLASSES, "n_blocks": 2, "d_block": 16}
    drop = {"d_hidden": None, "d_hidden_multiplier": 2.0, "dropout1": 0.1}
    return ResNet(**sizes, **drop, dropout2=0.0)


class Numbers(nn.Module):
    """Without categories."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, None)


def rtdl_ft_transformer():
    from rtdl_revisiting_models import FTTransformer

    sizes = {"n_blocks": 2, "d_block": 16, "attention_n_heads": 2}
    rest = {"attention_dropout": 0.1, "ffn_dropout": 0.1, "residual_dropout": 0.0}
    rest |= {"ffn_d_hidden": None, "ffn_d_hidden_multiplier": 2.0}
    return Numbers(
        FTTransformer(
            n_cont_features=8, cat_cardinalities=[], d_out=CLASSES, **sizes, **rest
        )
    )


def tabnet():
    from pytorch_tabnet.tab_network import TabNet

    none = {"cat_idxs": [], "cat_dims": [], "cat_emb_dim": []}
    sizes = {"n_d": 4, "n_a": 4, "n_steps": 2, "virtual_batch_size": 4}
    groups = torch.eye(8)
    return first(TabNet(8, CLASSES, **sizes, **none, group_attention_matrix=groups))


# Codebooks


class Coded(nn.Module):
    """An autoencoder with a codebook; the loss of the codebook is left out."""

    def __init__(self, codebook):
        super().__init__()
        self.encoder, self.codebook = nn.Linear(8, 8), codebook
        self.decoder = nn.Linear(8, 8)

    def forward(self, x):
        return self.decoder(self.codebook(self.encoder(x))[0])


def vq(**more):
    from vector_quantize_pytorch import VectorQuantize

    return Coded(VectorQuantize(dim=8, codebook_size=16, decay=0.8, **more))


def vq_ema():
    return vq()


def vq_kmeans():
    """The first batch makes the codebook."""
    return vq(kmeans_init=True, kmeans_iters=2)


def vq_residual():
    from vector_quantize_pytorch import ResidualVQ

    return Coded(ResidualVQ(dim=8, codebook_size=16, num_quantizers=2))


class Tuple(nn.Module):
    """For what takes [b, n, d] only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return (self.model(x.unsqueeze(1))[0].squeeze(1),)


def vq_fsq():
    from vector_quantize_pytorch import FSQ

    return Coded(Tuple(FSQ(levels=[4, 4], dim=8)))


# Other libraries


def snn_leaky():
    """Spikes, with a membrane that each sample begins anew."""
    import snntorch

    class Spiking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, CLASSES)
            self.leaky = snntorch.Leaky(beta=0.9, learn_beta=True)

        def forward(self, x):
            membrane, total = torch.zeros(len(x), 16), 0
            for _ in range(4):
                spikes, membrane = self.leaky(self.layer(x), membrane)
                total = total + self.head(spikes)
            return total

    return Spiking()


def normflows_real_nvp():
    """Returns log densities, of which the loss is the negative sum."""
    import normflows as nf

    flows = []
    for _ in range(2):
        flows.append(nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 8, 2])))
        flows.append(nf.flows.Permute(2, mode="swap"))
    flow = nf.NormalizingFlow(nf.distributions.base.DiagGaussian(2), flows)

    class Density(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow.log_prob(x).unsqueeze(1)

    return Density()


def density_loss(outputs, targets):
    return -outputs.sum()


def performer():
    """Random features in a buffer, which a counter draws anew."""
    from performer_pytorch import PerformerLM

    sizes = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "max_seq_len": LENGTH}
    return PerformerLM(num_tokens=TOKENS, causal=False, nb_features=8, **sizes)


def local_attention():
    from local_attention import LocalTransformer

    sizes = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "max_seq_len": 16}
    return LocalTransformer(
        num_tokens=TOKENS, local_attn_window_size=4, causal=True, **sizes
    )


def mambapy():
    from mambapy.mamba import Mamba, MambaConfig

    config = MambaConfig(d_model=16, n_layers=1, d_state=4)
    return nn.Sequential(nn.Embedding(TOKENS, 16), Mamba(config), nn.Linear(16, TOKENS))


# Plain torch


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def gru():
    return Recurrent(nn.GRU(4, 16, 2, dropout=0.2, batch_first=True))


def lstm():
    return Recurrent(nn.LSTM(4, 16, batch_first=True))


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return Through(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        before=nn.Linear(4, 16),
        after=nn.Sequential(nn.Flatten(), nn.Linear(16 * LENGTH, CLASSES)),
    )


class Variational(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log = nn.Linear(8, 4), nn.Linear(8, 4)
        self.decoder = nn.Linear(4, 8)

    def forward(self, x):
        noise = torch.randn(len(x), 4)
        return self.decoder(self.mean(x) + noise * self.log(x).exp())


def bags():
    bag = nn.EmbeddingBag(TOKENS, 16, mode="max")
    return nn.Sequential(bag, nn.Linear(16, CLASSES))


def sparse_bags():
    """Gradients are sparse tensors."""
    bag = nn.EmbeddingBag(TOKENS, 16, sparse=True)
    return nn.Sequential(bag, nn.Linear(16, CLASSES))


def normed():
    """Spectral norm in its old and its new form, and weight norm."""
    return nn.Sequential(
        spectral_norm(nn.Linear(8, 16)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(16, 16)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(16, CLASSES)),
    )


class Forces(nn.Module):
    """The output is a gradient: `torch.autograd.grad` in `forward`."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1, bias=False)
        self.energy = nn.Sequential(*layers)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            total = self.energy(x).sum()
            (found,) = torch.autograd.grad(total, x, create_graph=True)
        return found[:, :1]
