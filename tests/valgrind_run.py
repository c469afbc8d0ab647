"""A small layer on every path that runs here: what tests/sanitize.sh shows to valgrind."""

import numpy as np

from sysmt.config import ArrayConfig
from sysmt.hw.kernels import PackedConv, PackedGemm, available_paths

rng = np.random.default_rng(0)
weight = rng.integers(-127, 128, (9, 8, 3, 3)).astype(np.int8)
weight[rng.random(weight.shape) < 0.3] = 0
x = rng.normal(0, 60, (2, 8, 9, 17)).astype(np.float32)
for path in available_paths():
    for threads in (1, 2, 4):
        for signed in (False, True):
            config = ArrayConfig(threads=threads)
            for stride in (1, 2):
                conv = PackedConv(
                    weight,
                    config,
                    stride=(stride, stride),
                    padding=((1, 1), (1, 1)),
                    signed=signed,
                    path=path,
                )
                ones = np.ones(9, np.float32)
                result = conv.forward(x, 1.0, ones, affine=(ones, -ones), relu=True, cpu_threads=2)
                assert np.isfinite(result.y).all()
                assert result.counters is not None
            odd = PackedConv(weight[:, :7], config, signed=signed, path=path)
            odd.forward(np.ascontiguousarray(x[:, :7]), 1.0, np.ones(9, np.float32))
        a = rng.integers(0, 256, (70, 33)).astype(np.uint8)
        out, _ = PackedGemm(
            rng.integers(-127, 128, (33, 5)).astype(np.int8), ArrayConfig(threads=threads), path=path
        ).run(a)
        assert out.any()
    print(path, "ran")
