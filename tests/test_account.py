"""The account of a step: shares by kind. How long anything takes is no test's business."""

import pytest
import torch

from benchmarks.account import ON_CPU, ON_GPU, Account, Timed, account, shares


@pytest.mark.parametrize(
    ("kinds", "kernel", "kind"),
    [
        (ON_CPU, "aten::mkldnn_convolution", "convolutions"),
        (ON_CPU, "aten::convolution_backward", "convolutions"),
        (ON_CPU, "aten::addmm", "matrix products"),
        (ON_CPU, "aten::native_batch_norm_backward", "normalisation"),
        (ON_CPU, "aten::max_pool2d_with_indices", "pooling"),
        (ON_CPU, "aten::_to_copy", "copies"),
        (ON_CPU, "aten::linalg_vector_norm", "other arithmetic"),
        (ON_CPU, "aten::scatter", "other arithmetic"),
        (ON_GPU, "cudnn::ops::convertTensor_kernel", "copies"),
        (ON_GPU, "void at::native::_scatter_gather_elementwise_kernel", "other arithmetic"),
        (ON_CPU, "aten::threshold_backward", "other arithmetic"),
        (ON_GPU, "sm90_xmma_gemm_bf16f32", "convolutions and matrix products"),
        (ON_GPU, "void cudnn::bn_fw_tr_1C11_kernel_NCHW", "normalisation"),
        (ON_GPU, "Memcpy HtoD (Pinned -> Device)", "copies"),
        (ON_GPU, "void at::native::vectorized_elementwise_kernel", "other arithmetic"),
    ],
)
def test_each_kernel_has_a_kind(kinds: dict[str, str], kernel: str, kind: str) -> None:
    assert shares([Timed(name=kernel, seconds=0.25)], 1.0, kinds, "rest") == pytest.approx(
        dict.fromkeys(kinds, 0.0) | {kind: 0.25, "rest": 0.75}
    )


def test_kernels_that_take_longer_than_the_step_are_the_whole() -> None:
    kernels = [Timed(name="aten::conv2d", seconds=3.0), Timed(name="aten::mul", seconds=1.0)]
    found = shares(kernels, 2.0, ON_CPU, "rest")
    assert (found["convolutions"], found["other arithmetic"], found["rest"]) == (0.75, 0.25, 0.0)


def test_a_step_is_accounted_for() -> None:
    net, images = torch.nn.Conv2d(16, 64, 5), torch.rand(8, 16, 32, 32)
    threads = torch.get_num_threads()
    made = account("one", "fp32", lambda: net(images).sum().backward(), torch.device("cpu"))
    assert torch.get_num_threads() == threads
    assert sum(made.shares.values()) == pytest.approx(1)
    assert made.shares["convolutions"] > made.shares["other arithmetic"]
    assert Account.model_validate_json(made.model_dump_json()) == made
    line = made.line()
    assert line.startswith("- `one`, a step of ")
    assert line.index("convolutions") < line.index("other arithmetic")
