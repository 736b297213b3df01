"""Network Dissection and Compositional Explanations: what the units of a network say."""

from lightning_modules.dissection.module import Dissection
from lightning_modules.dissection.nli_classifier import NLIClassifier
from lightning_modules.dissection.nli_module import NLIDissection

__all__ = ["Dissection", "NLIClassifier", "NLIDissection"]
