"""Attacks on classifiers of images in [0, 1]."""

from arae.attacks.gradient import fgsm, perturb, pgd
from arae.attacks.threat import Threat
from arae.modes import evaluating

__all__ = ["Threat", "evaluating", "fgsm", "perturb", "pgd"]
