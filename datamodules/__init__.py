"""One LightningDataModule per shape of task, and the image sources behind them."""

from datamodules.open_set import OpenSetDataModule

__all__ = ["OpenSetDataModule"]
