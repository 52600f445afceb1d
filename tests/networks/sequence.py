"""Text: embeddings and recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .registry import network, randint, tokens


@network("text_gru", tokens(7, 20))
class TextGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.gru = nn.GRU(8, 12, num_layers=2, batch_first=True, dropout=0.1)
        self.fc = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        _, hidden = self.gru(self.embedding(ids))
        return self.fc(hidden[-1])


@network("text_lstm", tokens(7, 20))
class TextLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        outputs, (_, _) = self.lstm(self.embedding(ids))
        return self.fc(self.norm(outputs).amax(dim=1))


@network("rnn_cell_loop", tokens(4, 20))
class RNNCellLoop(nn.Module):
    """A cell called once per step: one leaf, several calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.cell = nn.GRUCell(8, 10)
        self.fc = nn.Linear(10, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        hidden = x.new_zeros(x.shape[0], 10)
        for step in range(4):
            hidden = self.cell(x[:, step], hidden)
        return self.fc(hidden)


@network("text_cnn", tokens(9, 20))
class TextCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.convs = nn.ModuleList(nn.Conv1d(8, 6, k) for k in (2, 3, 4))
        self.fc = nn.Linear(18, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        return self.fc(torch.cat([conv(x).relu().max(dim=-1).values for conv in self.convs], 1))


@network("embedding_bag", lambda batch: (randint(20, batch, 5), randint(30, batch, 3, key=1)))
class EmbeddingBagNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(20, 8, mode="mean")
        self.max = nn.EmbeddingBag(30, 6, mode="max")
        self.hidden = nn.Linear(14, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, words: Tensor, tags: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.hidden(torch.cat([self.mean(words), self.max(tags)], 1))))


@network("embedding_maxnorm", tokens(6, 20))
class EmbeddingMaxNorm(nn.Module):
    """`max_norm` renormalises rows of the table in every forward, eval mode included."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, max_norm=1.0)
        self.hidden = nn.Linear(8, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(torch.relu(self.hidden(self.embedding(ids))).mean(1))


@network("topk_argmax", tokens(7, 20))
class EndOfTextPooling(nn.Module):
    """CLIP's: the token with the largest id is the end of the text, its features are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.positions = nn.Parameter(torch.randn(7, 8) * 0.1)
        self.hidden = nn.Linear(8, 12)
        self.score = nn.Linear(12, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.hidden(self.embedding(ids) + self.positions))
        end = x[torch.arange(x.shape[0], device=x.device), ids.argmax(dim=-1)]
        best = self.score(x).squeeze(-1).topk(2, dim=1).indices
        chosen = x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1])).mean(1)
        return self.fc(torch.cat([end, chosen], dim=-1))


@network("cumsum_tokens", tokens(6, 20))
class CumulativeMean(nn.Module):
    """A causal running mean: cumsum along tokens, divided by constant counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embedding(ids)))
        counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).view(1, -1, 1)
        return self.fc(x.cumsum(dim=1) / counts)
