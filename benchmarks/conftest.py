"""One thread unless SNV2_BENCH_THREADS says otherwise, so that runs are comparable."""

import os

import torch

torch.set_num_threads(int(os.environ.get("SNV2_BENCH_THREADS", "1")))
