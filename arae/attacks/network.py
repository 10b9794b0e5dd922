"""The network as attacks see it: a copy that gives the same logits and the same gradient in the images, for less.

An attack runs the network in evaluation mode, K times a step, and wants no gradient of its weights. So its copy is in
the run's number format once and for all (autocast would convert weights and activations at every layer), its batch
norms are folded into the convolutions before them, and the gradient of a strided first convolution, which the usual
kernels are slowest at, is computed on blocks of pixels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from arae.attacks.stem import Stem, strided
from arae.by_image import image_by_image
from arae.models.taps import Encoder


class AttackNetwork(nn.Module):
    """Images [N, C, H, W] in [0, 1] -> logits [N, K] of an encoder in evaluation mode, up to rounding.

    It has weights of its own, which `refresh` brings up to date, once before its first use too. No gradient reaches
    them. Images are normalised in their own precision; what comes after is in the copy's.
    """

    def __init__(self, model: Encoder) -> None:
        """`model` stays as it is, and may be moved or shared out over workers afterwards."""
        super().__init__()
        self._model = [model]  # in a list: its weights are not this module's
        self.net = copy.deepcopy(model.net).eval().requires_grad_(False)
        graph = _graph(self.net)
        self._folded = dict(foldable(self.net, graph))
        for conv, norm in self._folded.items():
            _make_one(self.net, conv, norm)
        self._stem = _strided_stem(self.net, graph)
        self._form: tuple[torch.device, torch.dtype] | None = None

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Take over the model's weights and running statistics as they are now, on its device, in this format."""
        model = self._model[0]
        if self._form != (model.mean.device, dtype):
            self._form = model.mean.device, dtype
            self._place(*self._form)
        theirs = {**dict(model.net.named_parameters()), **dict(model.net.named_buffers())}
        for conv, norm in self._folded.items():
            pair = model.net.get_submodule(conv), model.net.get_submodule(norm)
            fold(*pair, self.net.get_submodule(conv))  # type: ignore[arg-type] -- as `foldable` found them
        for name, ours in (*self.net.named_parameters(), *self.net.named_buffers()):
            if name in theirs and name.rpartition(".")[0] not in self._folded:
                ours.copy_(theirs[name])
        if self._stem is not None:
            self._stem.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """Logits in the copy's format."""
        assert self._form is not None, "refresh() first"
        model = self._model[0]
        with torch.autocast(x.device.type, enabled=False):
            return self.net(_Normalised.apply(x, model.mean, model.std, self._form[1]))

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        for module in self.net.modules():
            # A batch norm that stands alone takes activations in half precision with statistics in full.
            kept = isinstance(module, nn.modules.batchnorm._BatchNorm) and dtype != torch.float64
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                form = torch.float32 if kept else dtype
                tensor.data = _last(tensor.data.to(device, form if tensor.is_floating_point() else tensor.dtype))


class _Normalised(torch.autograd.Function):
    """(x - mean) / std in another precision, and its gradient in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
        """Of images [N, C, H, W]."""
        ctx.std, ctx.dtype = std, x.dtype

        def work(x: Tensor, out: Tensor) -> None:
            out.copy_((x - mean).div_(std))

        return image_by_image(work, x, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """The image's."""

        def work(gradient: Tensor, out: Tensor) -> None:
            out.copy_(gradient).div_(ctx.std)

        return image_by_image(work, gradient, dtype=ctx.dtype), None, None, None


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, both: nn.Conv2d) -> None:
    """Give `both` weights W · s and bias b' + (b - mean) · s, where s = gamma / sqrt(var + eps): the pair in one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert both.bias is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    both.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    both.bias.copy_(shift * scale if norm.bias is None else norm.bias + shift * scale)


class _Tracer(fx.Tracer):
    """Looks into modules that are made of others, and into nothing else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)


def foldable(net: nn.Module, graph: fx.Graph | None) -> list[tuple[str, str]]:
    """Paths of the convolutions and batch norms of which each pair can be one convolution, in evaluation mode.

    Nothing but the batch norm sees the convolution's output, and both run once. Empty for a network whose graph can't
    be had (None).
    """
    if graph is None:
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    runs = [node.target for node in calls]
    pairs = []
    for node in calls:
        before = node.args[0] if len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = net.get_submodule(str(before.target)), net.get_submodule(str(node.target))
        once = runs.count(before.target) == runs.count(node.target) == 1
        plain = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_var is not None
        if once and plain and _alone(net, graph, conv) and _alone(net, graph, norm):
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _alone(net: nn.Module, graph: fx.Graph | None, module: nn.Module) -> bool:
    """Whether the module does what its kind does and no more, in one place, with tensors that nobody else uses."""
    (path, *others) = (name for name, one in net.named_modules(remove_duplicate=False) if one is module)
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    tensors = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    held = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    shared = sum(id(tensor) in tensors for _, tensor in held) > len(tensors)
    read = graph is None or any(n.op == "get_attr" and str(n.target).startswith(f"{path}.") for n in graph.nodes)
    return not (others or hooked or shared or read)


def _graph(net: nn.Module) -> fx.Graph | None:
    """What runs after what; None where that depends on the data, or can't be told."""
    try:
        return _Tracer().trace(net)
    except Exception:  # noqa: BLE001 -- whatever a network does while it is traced; it is then used as it is
        return None


def _make_one(net: nn.Module, conv_path: str, norm_path: str) -> None:
    """Let the convolution have the batch norm's work, and leave nothing in the place of that."""
    conv = net.get_submodule(conv_path)
    assert isinstance(conv, nn.Conv2d)
    conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]), requires_grad=False)
    net.set_submodule(norm_path, nn.Identity())


def _strided_stem(net: nn.Module, graph: fx.Graph | None) -> Stem | None:
    """Replace a strided first convolution by one with a quicker gradient, and return that."""
    first = next((node for node in graph.nodes if node.op == "call_module"), None) if graph else None
    if first is None or [getattr(one, "op", None) for one in first.args] != ["placeholder"]:
        return None
    conv = net.get_submodule(first.target)
    if type(conv) is not nn.Conv2d or not strided(conv) or not _alone(net, graph, conv):
        return None
    stem = Stem(conv)
    net.set_submodule(first.target, stem)
    return stem


def quicken(net: nn.Module) -> None:
    """Give a network whose weights stay as they are, on the device where it is, a quicker gradient in its images.

    Its names and numbers stay the same. For networks whose weights take no gradient: the quick convolution gives none.
    """
    stem = _strided_stem(net, _graph(net))
    if stem is not None:
        stem.refresh()


def _last(tensor: Tensor) -> Tensor:
    """Weights of convolutions with the channels last, also where there is one, for which PyTorch sees no difference."""
    return tensor.clone(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
