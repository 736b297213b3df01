"""Adversarial-learning papers as LightningModules, one folder each."""
