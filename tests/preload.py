"""What the fork server imports once for all runs."""

import torch
import wandb  # noqa: F401

import train  # noqa: F401

torch.set_num_threads(1)
