import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sysmt.nn.array.lowering import LayerGeometry, im2col


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid", 0, 1, (2, 1)]))
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, (2, 1), 3]))
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 3, (1, 2), (4, 3)])),
        stride=stride,
        padding=padding,
        dilation=draw(st.sampled_from([1, 2, (1, 2)])),
        groups=groups,
        padding_mode=mode,
        bias=False,
    )
    return conv, draw(st.integers(7, 10)), draw(st.integers(7, 10))


@settings(deadline=None, max_examples=80)
@given(convolutions())
def test_im2col_times_weights_is_the_convolution(case):
    conv, height, width = case
    torch.manual_seed(0)
    x = torch.randint(0, 256, (2, conv.in_channels, height, width)).float()
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-127, 128, conv.weight.shape).float())
        expected = conv.double()(x.double()).numpy()
    geometry = LayerGeometry.of(conv)
    assert geometry.output_size(height, width) == expected.shape[2:]
    a = im2col(geometry.pad_float(x).numpy(), geometry).astype(np.int64)
    b = (
        conv.weight.detach()
        .numpy()
        .astype(np.int64)
        .reshape(geometry.groups, geometry.gemm_n, geometry.gemm_k)
    )
    out = np.einsum("gbmk,gnk->bgnm", a, b)
    assert np.array_equal(out.reshape(expected.shape), expected)


def test_im2col_column_order_is_torch_unfold():
    x = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).reshape(2, 3, 5, 4)
    conv = nn.Conv2d(3, 1, (3, 2), stride=(1, 2), padding=1)
    expected = nn.functional.unfold(x, (3, 2), padding=1, stride=(1, 2)).transpose(1, 2).numpy()
    assert np.array_equal(im2col(x.numpy(), LayerGeometry.of(conv))[0], expected)


def test_linear_is_a_pointwise_convolution():
    geometry = LayerGeometry.of(nn.Linear(12, 5))
    assert (geometry.gemm_k, geometry.gemm_n, geometry.kernel) == (12, 5, (1, 1))


@pytest.mark.parametrize(("groups", "depthwise"), [(1, False), (4, True), (2, False)])
def test_depthwise(groups, depthwise):
    assert LayerGeometry.of(nn.Conv2d(4, 8, 3, groups=groups)).depthwise is depthwise


def test_one_input_channel_is_not_depthwise():
    assert not LayerGeometry.of(nn.Conv2d(1, 8, 3)).depthwise


def test_geometry_is_frozen():
    geometry = LayerGeometry.of(nn.Conv2d(1, 1, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        geometry.groups = 2
