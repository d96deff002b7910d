"""One thread a process: the models of the tests are small, and the processes of pytest-xdist share the cores."""

import torch

torch.set_num_threads(1)
