"""A forked child has one thread and the memory of many: its own runs must end, and be right."""

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")

OPERANDS = """
import os, signal, sys, threading, warnings
import numpy as np
import sysmt
warnings.simplefilter("ignore")  # Python warns of forks beside threads, which is what is tested
rng = np.random.default_rng(0)
a = rng.integers(0, 256, (300, 96)).astype(np.uint8)
b = rng.integers(-127, 128, (96, 40)).astype(np.int8)
want = a.astype(np.int32) @ b  # T = 1 is exact

def is_right(cpu_threads):
    run = sysmt.simulate_gemm(a, b, sysmt.ArrayConfig(threads=1), cpu_threads=cpu_threads)
    return np.array_equal(run.out_mn, want)

def forked(cpu_threads):
    # How a child's own run ends: 0 if well, else with 3 or, after 30 s, a signal
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os._exit(0 if is_right(cpu_threads) else 3)
    return os.waitpid(pid, 0)[1]
"""


def run_script(code):
    script = OPERANDS + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fork_beside_other_threads_calls_computes_the_right_values():
    run_script(
        """
        small = a[:8], b[:, :8]
        assert is_right(1)  # loads the module; an import that a fork interrupts would be Python's own fault
        sys.setswitchinterval(1e-4)  # the forks shall not wait for Python's own lock
        stop = False
        def work():
            while not stop:
                sysmt.simulate_gemm(*small)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        ends = [forked(1 + i % 2) for i in range(500)]
        stop = True
        for thread in threads:
            thread.join()
        sys.exit(any(ends) and f"{sum(map(bool, ends))} of {len(ends)} children hung or were wrong")
        """
    )


@pytest.mark.parametrize("openmp", ["import torch", ""])
def test_a_fork_after_runs_on_many_threads_computes_the_right_values(openmp):
    run_script(
        f"""
        {openmp}
        assert is_right(2)
        ends = [forked(cpu_threads) for cpu_threads in (1, 2, 4, 2)]
        sys.exit(any(ends) and f"children ended with {{ends}}")
        """
    )


def test_workers_of_a_data_loader_compute_the_right_values():
    run_script(
        """
        import torch
        from torch.utils.data import DataLoader, Dataset
        class Runs(Dataset):
            def __len__(self):
                return 6
            def __getitem__(self, index):
                return is_right(1 + index % 2)
        assert is_right(2)
        loader = DataLoader(Runs(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=30)
        assert torch.cat(list(loader)).tolist() == [True] * 6
        """
    )


def test_a_pool_by_fork_computes_the_right_values():
    run_script(
        """
        import multiprocessing
        import torch
        assert is_right(2)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(is_right, [1, 2, 1, 2]).get(timeout=30) == [True] * 4
        """
    )


def test_a_forks_child_can_fork_again():
    run_script(
        """
        import torch
        assert is_right(2)
        pid = os.fork()
        if pid == 0:
            signal.alarm(40)
            os._exit(0 if is_right(2) and forked(2) == 0 else 3)
        sys.exit(os.waitpid(pid, 0)[1] and "the child or its own child failed")
        """
    )
