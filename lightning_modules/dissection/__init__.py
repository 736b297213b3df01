"""Network Dissection and Compositional Explanations: what the units of a network say."""
