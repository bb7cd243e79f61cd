"""Convolutional models."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from .entry import Entry, floats


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """ResNet's layout, narrow, with one block a stage."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [width, width, 2 * width, 4 * width]
        self.layers = nn.Sequential(*(nn.Sequential(Block(a, b, 1 + (a != b))) for a, b in itertools.pairwise(widths)))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


class MobileNet(nn.Module):
    """Inverted residuals: expand, depthwise, squeeze and excite, project."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish())
        wide = 3 * width
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 5, 1, 2, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1))
        self.project = nn.Conv2d(wide, width, 1)
        self.strided = nn.Conv2d(width, 2 * width, 3, 2, 1, dilation=1, groups=width)
        self.grouped = nn.Conv2d(2 * width, 8, 3, padding="same", dilation=2, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.squeeze(y))
        x = F.dropout2d(x + self.project(y), 0.1, self.training)
        return self.head(self.grouped(self.strided(x)).mean([2, 3]))


class UNet(nn.Module):
    """Down and up with skips; group norms, transposed convolutions and upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1, stride=2)
        self.norm = nn.GroupNorm(3, 12)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1)
        self.smooth = nn.Conv2d(12, 4, 3, padding=1, padding_mode="reflect")
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.gelu(self.down1(x))
        b = F.gelu(self.norm(self.down2(a)))
        c = self.smooth(torch.cat([a, self.up(b)], dim=1))
        return self.out(self.upsample(c))


class Dense(nn.Module):
    """DenseNet's concatenations, with average pools of every option."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1)) for c in (3, 7, 11)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(15), nn.Conv2d(15, 8, 1))
        self.pools = nn.ModuleList(
            [
                nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
                nn.AvgPool2d(2, ceil_mode=True),
                nn.AvgPool2d(3, 2, 1, divisor_override=5),
                nn.MaxPool2d(3, 2, 1, ceil_mode=True),
                nn.MaxPool2d(2, 1, dilation=2),
                nn.AdaptiveAvgPool2d((3, 2)),
                nn.AdaptiveMaxPool2d(2),
                nn.LPPool2d(2, 2),
            ]
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        x = self.transition(x)
        return [pool(x) for pool in self.pools]


class Padding(nn.Module):
    """Padding modes and interpolation modes."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode=m) for m in ("zeros", "reflect", "replicate", "circular")
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = sum(conv(x) for conv in self.convs)
        return [
            F.interpolate(y, scale_factor=2, mode="nearest"),
            F.interpolate(y, size=(5, 11), mode="nearest"),
            F.interpolate(y, size=(5, 11), mode="nearest-exact"),
            F.interpolate(y, scale_factor=1.5, mode="bilinear"),
            F.interpolate(y, size=(13, 9), mode="bilinear", align_corners=True),
            F.interpolate(y, size=(13, 9), mode="bicubic"),
            F.interpolate(y.flatten(2), size=29, mode="linear"),
            F.pad(y, (1, -1, 2, 0), value=0.5),
        ]


class SuperResolution(nn.Module):
    """Pixel shuffle and unshuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(F.pixel_unshuffle(x, 2)).tanh()
        return F.pixel_shuffle(F.channel_shuffle(self.norm(self.second(y)), 2), 2)


class Volume(nn.Module):
    """Three spatial axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.up = nn.ConvTranspose3d(4, 2, 2, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool3d(self.norm(self.conv(x)).relu(), 2)
        return F.avg_pool3d(self.up(y), 2).flatten(1) * F.adaptive_avg_pool3d(y, 1).mean((1, 2, 3, 4))[:, None]


class Patches(nn.Module):
    """unfold and fold around a linear layer; local response norm; grid_sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 12)
        self.turn = nn.Parameter(torch.tensor([[0.9, 0.1, 0.05], [-0.1, 0.95, 0.1]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        y = F.fold(self.mix(patches).transpose(1, 2), (6, 6), 2, stride=2)
        grid = F.affine_grid(self.turn.expand(x.shape[0], 2, 3), list(x.shape), align_corners=False)
        return F.local_response_norm(y, 3) + F.grid_sample(y, grid, align_corners=False)


class ConvNeXt(nn.Module):
    """Depthwise 5 x 5, a LayerNorm over channels last, a layer scale."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return (x + y.permute(0, 3, 1, 2)).mean((-2, -1))


MODELS = {
    "lenet": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(8, 10),
        ),
        floats(1, 14, 14),
    ),
    "resnet": Entry(ResNet, floats(3, 32, 32), slow=True),
    "mobilenet": Entry(MobileNet, floats(3, 16, 16)),
    "unet": Entry(UNet, floats(1, 8, 8)),
    "densenet": Entry(Dense, floats(3, 9, 7)),
    "padding": Entry(Padding, floats(2, 7, 6)),
    "superresolution": Entry(SuperResolution, floats(1, 8, 8)),
    "volume": Entry(Volume, floats(1, 4, 6, 4)),
    "patches": Entry(Patches, floats(3, 6, 6)),
    "convnext": Entry(ConvNeXt, floats(3, 16, 16)),
}  # fmt: skip
