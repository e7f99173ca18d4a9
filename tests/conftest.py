"""What all tests share."""

import torch

# Batches are tiny here: a second thread costs more than it does, and on busy cores
# threads that wait for each other take tens of times as long. Tests of threads set
# their number themselves.
torch.set_num_threads(1)
