"""Recurrent layers: stacked, in both directions, projected, with given states, as cells in a loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .registry import floats, network, randn, tokens


@network("stacked_both_ways", floats(6, 5))
class StackedBothWays(nn.Module):
    """Two layers, two directions, dropout between the layers, gated features in front; unused last states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.gru = nn.GRU(8, 6, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(torch.relu(self.embed(x)))[0].mean(1))


@network("projected_lstm", tokens(7, 20))
class ProjectedLSTM(nn.Module):
    """`proj_size`: what goes on is a projection of the units. Time comes first, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 10, num_layers=2, proj_size=6, bias=False, bidirectional=True)
        self.fc = nn.Linear(2 * 6 + 10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        outputs, (hidden, memory) = self.lstm(self.embedding(ids.t()))
        return self.fc(torch.cat([outputs[-1], memory[-1]], 1)) + hidden[0].sum(-1, keepdim=True)


@network("encoder_decoder", lambda batch: (randn(batch, 6, 5), randn(batch, 4, 3, key=1)))
class EncoderDecoder(nn.Module):
    """One layer's last states are another's first ones: masked by their own masks, then read through the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(5, 8, batch_first=True)
        self.decoder = nn.LSTM(3, 8, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, states = self.encoder(source)
        return self.fc(self.decoder(target, states)[0])


@network("given_states", lambda batch: {"x": randn(batch, 5, 4), "states": (randn(batch, 6), randn(batch, 6, key=1))})
class GivenStates(nn.Module):
    """States come in and go out: what a caller keeps between chunks of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.again = nn.RNN(6, 6, nonlinearity="relu", batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, (hidden, memory) = self.lstm(x, (states[0].unsqueeze(0), states[1].unsqueeze(0)))
        x, _ = self.again(x, hx=hidden)
        return self.fc(x[:, -1]), (hidden[0], memory[0])


@network("cells_with_readout", floats(4, 5))
class CellsWithReadout(nn.Module):
    """Two kinds of cells in one loop; each step's state is read by the head and by the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.LSTMCell(5, 8)
        self.upper = nn.RNNCell(8, 6)
        self.score = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, top, scores = None, None, []
        for step in range(4):
            states = self.lower(x[:, step], states)
            top = self.upper(states[0], top)
            scores.append(self.score(top))
        return torch.stack(scores, 1)
