import pytest
import torch
from torch import nn

from lightning_modules.zaq.gdfq import gdfq_generator_loss, gdfq_student_loss
from lightning_modules.zaq.zeroq import record_norm_inputs


def test_released_distillation_is_weaker_by_the_number_of_classes() -> None:
    student, teacher, labels = torch.randn(4, 7), torch.randn(4, 7), torch.tensor([0, 1, 2, 3])
    mean = gdfq_student_loss(student, teacher, labels)
    batchmean = gdfq_student_loss(student, teacher, labels, reduction="batchmean")
    torch.testing.assert_close(7 * mean["distillation"], batchmean["distillation"])
    torch.testing.assert_close(mean["classification"], batchmean["classification"])
    torch.testing.assert_close(mean["total"], mean["distillation"] + mean["classification"])


def test_equal_logits_need_no_distillation() -> None:
    logits = torch.randn(4, 7)
    found = gdfq_student_loss(logits, logits, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found["distillation"], torch.tensor(0.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.0}, "temperature=0.0"), ({"reduction": "sum"}, "unknown reduction='sum'")],
)
def test_bad_options(options: dict, message: str) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        gdfq_student_loss(logits, logits, torch.tensor([0, 1]), **options)


def test_generator_loss_reaches_the_images() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    network.eval()
    images = torch.randn(6, 3, 4, 4, requires_grad=True)
    with record_norm_inputs(network) as inputs:
        logits = network(images)
    found = gdfq_generator_loss(logits, torch.zeros(6, dtype=torch.long), inputs, bns_weight=2.0)
    torch.testing.assert_close(found["total"], found["classification"] + 2 * found["statistics"])
    (gradient,) = torch.autograd.grad(found["statistics"], images)
    assert gradient.any()


def test_statistics_must_have_been_recorded() -> None:
    with pytest.raises(ValueError, match="record_norm_inputs"):
        gdfq_generator_loss(torch.zeros(2, 3), torch.tensor([0, 1]), [])
