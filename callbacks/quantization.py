"""Quantized networks judged and handed over: the table of all methods and widths, and the integer network as a file."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.media import run_directory
from callbacks.report import require, write_table
from lightning_modules.files import file_name
from lightning_modules.zaq.deploy import deploy
from lightning_modules.zaq.export import (
    demand_integer_kernels,
    export_onnx,
    measure_onnx,
    verify_onnx,
)

NOTES = ("accuracy x100 on all test images",)


class QuantizationReport(Callback):
    """Prints and stores the accuracy of every method at every width.

    Works with any module that offers ``ready_rows`` (row names), ``row_titles`` (row to description) and
    ``column_names`` (widths), and logs ``test/ROW/WIDTH``. A module may offer ``table_notes``, lines below the table,
    and ``allocated_bits``, of mixed precision: bits by layer, by width.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module compares nothing.
        """
        require(self, pl_module, "ready_rows", "row_titles", "column_names")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes and prints ``quantization_table.txt``, and ``bits_table.txt`` where layers have bits of their own."""
        if not trainer.is_global_zero:
            return
        module: Any = pl_module
        values = {key: 100 * float(value) for key, value in trainer.callback_metrics.items()}
        rows = [
            [
                module.row_titles[row],
                *(values.get(f"test/{row}/{column}") for column in module.column_names),
            ]
            for row in module.ready_rows
        ]
        data = getattr(getattr(trainer, "datamodule", None), "split_info", {})
        title = f"Quantization without data, {data.get('dataset', 'test set')}"
        notes = [*NOTES, *getattr(module, "table_notes", ())]
        columns = ["method", *module.column_names]
        print(f"wrote {write_table(trainer, 'quantization', title, columns, rows, notes)}")
        bits: dict[str, dict[str, int]] = getattr(module, "allocated_bits", {})
        if bits:
            layers = dict.fromkeys(layer for of_width in bits.values() for layer in of_width)
            rows = [[layer, *(bits[width].get(layer) for width in bits)] for layer in layers]
            title = "Bits of the weights in mixed precision"
            print(f"wrote {write_table(trainer, 'bits', title, ['layer', *bits], rows)}")


class IntegerExport(Callback):
    """Writes the quantized networks as integer ONNX files after a test, and proves what they are.

    Every network becomes ``WIDTH.onnx`` in the run directory, beside ``float.onnx``. Each is run by onnxruntime, fully
    optimised, on all test images and compared with the integer network in torch. Once the table is written the run
    fails where a decision or a logit differs, unless told otherwise; it fails where onnxruntime would not use integers.
    Size and latency are those on this machine's CPU.

    Works with any module that offers ``deployable_networks()`` (name to the result of ``quantize_model``),
    ``float_network``, and ``to_network(images)``, and a DataModule whose ``test`` has ``batch(indices)``.

    Args:
        tolerance: largest difference of a logit.
        strict: fail where more differs; otherwise the table says so.
        min_integer_kernels: layers that must be integer arithmetic in each file; 0 demands none.
        latency_batch: images of a call whose time is measured.
        latency_runs: calls of which the median is taken.

    Raises:
        ValueError: a number that is impossible.
    """

    def __init__(
        self,
        tolerance: float = 1e-5,
        strict: bool = True,
        min_integer_kernels: int = 1,
        latency_batch: int = 1,
        latency_runs: int = 50,
    ) -> None:
        for name, value, least in (
            ("tolerance", tolerance, 0),
            ("min_integer_kernels", min_integer_kernels, 0),
            ("latency_batch", latency_batch, 1),
            ("latency_runs", latency_runs, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.tolerance = tolerance
        self.strict = strict
        self.min_integer_kernels = min_integer_kernels
        self.latency_batch = latency_batch
        self.latency_runs = latency_runs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module has nothing to export.
        """
        require(self, pl_module, "deployable_networks", "float_network", "to_network")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes, verifies and measures; prints ``export_table.txt``.

        Raises:
            ImportError: onnx, onnxscript or onnxruntime is missing.
            RuntimeError: a file differs from its network, or does not use integer arithmetic.
        """
        if not trainer.is_global_zero:
            return
        module: Any = pl_module
        test_set = trainer.datamodule.test  # type: ignore[attr-defined]
        device = module.device
        # What is made in inference mode cannot be traced by the exporter.
        with torch.inference_mode(False), torch.no_grad():
            try:
                module.cpu()
                rows, wrong = self._export(trainer, module, test_set)
            finally:
                module.to(device)
        columns = ["network", "size (KB)", f"us / {self.latency_batch} image(s)", "integer layers"]
        columns += ["float layers", "same label %", "max diff x1e6", "accuracy"]
        notes = [
            "same label, max diff: onnxruntime against the same network in torch, on all test images",
            f"us: median of {self.latency_runs} calls, one thread, onnxruntime on this CPU",
            *wrong,
        ]
        title = "Exported networks, ZAQ of the last epoch"
        print(f"wrote {write_table(trainer, 'export', title, columns, rows, notes)}")
        if wrong and self.strict:
            raise RuntimeError("; ".join(wrong))

    def _export(
        self, trainer: Trainer, module: Any, test_set: Any
    ) -> tuple[list[list[Any]], list[str]]:
        """Rows of the table, and what is wrong with the files."""
        sample = next(_batches(module, test_set, self.latency_batch))[0]
        networks: dict[str, nn.Module] = {"float": module.float_network}
        networks |= {
            name: deploy(quantized) for name, quantized in module.deployable_networks().items()
        }
        rows, wrong = [], []
        for name, network in networks.items():
            network = network.float()
            path = export_onnx(network, run_directory(trainer) / f"{file_name(name)}.onnx", sample)
            parity = verify_onnx(path, network, (x for x, _ in _batches(module, test_set)))
            least = 0 if name == "float" else self.min_integer_kernels
            kernels = demand_integer_kernels(path, least)
            if name != "float" and (parity.agreement < 1 or parity.max_difference > self.tolerance):
                wrong.append(
                    f"{path} is not the network it was written from: of {parity.predictions} test images "
                    f"{100 * parity.agreement:.2f} % get the same label, and logits differ by up to "
                    f"{parity.max_difference:.2e} (tolerance {self.tolerance:.0e})"
                )
            cost = measure_onnx(path, sample, self.latency_runs)
            right = [network(x).argmax(1) == labels for x, labels in _batches(module, test_set)]
            rows.append(
                [
                    name,
                    cost.size / 1000,
                    1e6 * cost.latency,
                    kernels.integer,
                    kernels.floating,
                    100 * parity.agreement,
                    1e6 * parity.max_difference,
                    100 * float(torch.cat(right).float().mean()),
                ]
            )
        return rows, wrong


def _batches(module: Any, test_set: Any, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels of all test images, on the CPU."""
    for indices in torch.arange(len(test_set)).split(size):
        batch = test_set.batch(indices)
        yield module.to_network(batch["image"]), batch["label"]
