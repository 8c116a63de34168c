"""What the environment of the tests says, before any module is imported that reads it as it is loaded."""

import os

# The tests are of the CPU, also on a machine with a GPU: where one is used is for each to say, and few do.
# On a GPU: QUARK_FAST_TEST_GPU=1 pytest tests/ops/test_triton.py tests/rollout/test_token_kernel.py
if "QUARK_FAST_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

# One core each for the processes that run the tests, and for those that they start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whose threads would not outlive a fork, either

# A name that is no folder is looked up on the hub; without a network its client asks again for 23 s.
os.environ["HF_HUB_OFFLINE"] = "1"

# Without a GPU, tests have Triton interpret the kernels, which it decides when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
