from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_modules.dissection.quantiles import TopKQuantile, quantile_threshold


def activations(n: int = 40, dead: bool = True) -> torch.Tensor:
    values = torch.randn(n, 3, 5, 4, generator=torch.Generator().manual_seed(n)).relu()
    if dead:
        values[:, 1] = 0
    return values


@pytest.mark.parametrize("quantile", [0.005, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("method", ["linear", "hazen"])
def test_thresholds_are_numpys(quantile: float, method: str) -> None:
    values = activations()
    flat = values.transpose(0, 1).flatten(1).double().numpy()
    expected = np.quantile(flat, 1 - quantile, axis=1, method=method)  # type: ignore[call-overload]
    found = quantile_threshold(values, quantile, interpolation=method)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_level_replaces_the_quantile() -> None:
    values = activations()
    assert torch.equal(
        quantile_threshold(values, level=0.75), quantile_threshold(values, quantile=0.25)
    )


def test_batches_and_processes_do_not_matter() -> None:
    values = activations()
    expected = quantile_threshold(values)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    parts = []
    for start, stop in pairwise((0, 1, 17, 40)):
        metric = TopKQuantile(3, 800)
        metric.update(values[order[start:stop]])
        parts.append(metric)
    merged = parts[0]
    merged.top = merged._merge(torch.stack([part.top for part in parts]))
    merged.seen = sum(part.seen for part in parts)  # type: ignore[assignment]
    assert torch.equal(merged.compute(), expected)
    batches = TopKQuantile(3, 800)
    for batch in values.split(7):
        batches.update(batch)
    assert torch.equal(batches.compute(), expected)
    assert batches.top.shape == (3, 5)


def test_share_above_is_the_quantile() -> None:
    values = activations(200, dead=False)
    share = (values > quantile_threshold(values, 0.05)[:, None, None]).float().mean((0, 2, 3))
    assert torch.allclose(share, torch.tensor(0.05), atol=1e-6)


def test_too_few_activations() -> None:
    metric = TopKQuantile(3, 800)
    metric.update(activations()[:39])
    with pytest.raises(ValueError, match="780 activations of a unit were added, but n_total=800"):
        metric.compute()


def test_bad_activations() -> None:
    metric = TopKQuantile(3, 800)
    with pytest.raises(ValueError, match=r"must be \[B, 3, ...\]"):
        metric.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="contain nan"):
        metric.update(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="n_total=0"):
        quantile_threshold(torch.zeros(0, 3, 2, 2))
    with pytest.raises(ValueError, match=r"a share in \(0, 1\), not -1"):
        quantile_threshold(torch.zeros(1, 3), quantile=2)
    with pytest.raises(ValueError, match="interpolation='nearest'"):
        quantile_threshold(torch.zeros(1, 3), interpolation="nearest")  # type: ignore[arg-type]
