"""A ResNet in torch with torchvision's layout and names, for weights as torchvision saves them."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, inner, width, stride, bottleneck):
        super().__init__()
        outer = width * (4 if bottleneck else 1)
        plan = [(width, 3, stride), (outer, 3, 1)]
        if bottleneck:
            plan = [(width, 1, 1), (width, 3, stride), (outer, 1, 1)]
        self.length = len(plan)
        for i, (features, size, step) in enumerate(plan, 1):
            conv = nn.Conv2d(
                inner if i == 1 else width, features, size, step, size // 2, bias=False
            )
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(features))
        self.downsample = None
        if stride > 1 or inner != outer:
            shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outer))

    def forward(self, x):
        y = x
        for i in range(1, self.length + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.length else y
        return torch.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
    def __init__(self, counts, bottleneck, width=64, channels=3, classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inner = width
        for stage, count in enumerate(counts):
            blocks = []
            for i in range(count):
                stride = 2 if stage and not i else 1
                blocks.append(Block(inner, width * 2**stage, stride, bottleneck))
                inner = width * 2**stage * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inner, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def random_resnet(counts, bottleneck, seed=0, **sizes):
    """In evaluation mode, with statistics, scales and biases that are not trivial."""
    torch.manual_seed(seed)
    net = ResNet(counts, bottleneck, **sizes).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.running_var, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
            ):
                nn.init.uniform_(tensor, low, high)
    return net
