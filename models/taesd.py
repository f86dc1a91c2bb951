from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TAESDParams:
    latent_channels: int = 4


class TAESD(nn.Module):
    factor = 8

    def __init__(self, params: TAESDParams) -> None:
        super().__init__()
        self.params = params
