"""ZAQ and the data-free baselines: from golden cases to lightning_modules.zaq, in two parts."""

from tests.golden_adapters.zaq_methods import METHODS
from tests.golden_adapters.zaq_quantization import QUANTIZATION

ADAPTERS = {**QUANTIZATION, **METHODS}
